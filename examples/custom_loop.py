"""Local SGD written by hand, on the two messages of a round. `mpips.connect` would make all this for you.

    push  workers to server  | change of the weights || a row from each rank: samples, loss, round ... |  MPI Reduce
    pull  server to workers  | control: round, stop, loss ... | weights | BatchNorm statistics         |  MPI Bcast

A worker's half is `push`, then `pull`. The server's is `round`: collect_updates, update_weights, note, send_updates.
Between two rounds the loop does what it likes. In this one a worker takes steps of its own and pushes how far they led.

    python examples/custom_loop.py                      one process is server and worker
    mpirun -n 4 python examples/custom_loop.py          1 server, 3 workers
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import accuracy, digits
from torch import Tensor, nn

import mpips
from mpips.report.run_report import Report
from mpips.run.run_folder import new_folder


def work(worker: mpips.Worker, model: nn.Module, data: list[Tensor], args: argparse.Namespace) -> None:
    flat = worker.replica.flat  # flat.weights, flat.grad: the memory of all parameters and of all their gradients
    x, y = (t[worker.index :: worker.workers] for t in data)  # this worker's shard
    own = torch.optim.SGD(model.parameters(), lr=args.lr)
    for _ in range(args.rounds):
        pulled, total = flat.weights.clone(), 0.0
        for batch in torch.randint(len(x), (args.steps, args.batch_size)):
            own.zero_grad(set_to_none=False)  # the gradients stay where they are, in flat.grad
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            own.step()
            total += loss.item() / args.steps
        flat.grad.copy_(pulled - flat.weights)  # to be pushed where a gradient would be
        flat.weights.copy_(pulled)  # the server's optimizer goes on from here, in this memory if it is on this rank
        worker.push(total, args.steps * args.batch_size)
        worker.pull()  # flat.weights is the next version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10, help="a worker's own, between pull and push")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.2)
    mpips.add_arguments(parser)
    args = parser.parse_args()

    config, device = mpips.configure(), mpips.device()
    torch.manual_seed(0)
    train, test = ([t.to(device) for t in part] for part in digits())
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    communicator = mpips.join(config)
    if communicator.rank:
        (worker := mpips.Worker(communicator, model, config)).receive_initial_weights()
        work(worker, model, train, args)
        worker.give_performance()
        return

    report = Report(Path(config.run_dir or new_folder()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1)  # weights - mean(pulled - after) = mean(after)
    server = mpips.Server(communicator, model, optimizer, config=config, report=report)
    server.broadcast_initial_weights()
    if server.trains:  # no other rank, or --server_trains: the worker on this rank has the server do the rounds
        worker = mpips.Worker(communicator, model, config, server)
        worker.receive_initial_weights()
        work(worker, model, train, args)
    else:
        for _ in range(args.rounds):
            print("round {round:.0f}  loss {loss:.4f}".format(**vars(server.round())))  # the control that went out
    server.write_results([server.validate(lambda: accuracy(model, test), "test accuracy")])


if __name__ == "__main__":
    main()
