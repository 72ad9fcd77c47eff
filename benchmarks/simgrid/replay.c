/* Replays a schedule that check.py wrote, on a simulated network: `smpirun ... ./replay FOLDER BYTES PUSH PULL`.

FOLDER/<node>.txt is what one node posts: the number of steps, then for each step of the push and for each of the pull
    taken N  node bytes  node bytes ...
    sent N   node bytes  node bytes ...
BYTES is the longest message. PUSH and PULL are how many steps are under way while one is waited for: Rooms._travel posts a step,
then waits for the one so many steps before; Rooms.publish posts all steps of the pull, then waits. Nothing is computed.

Prints the seconds of the push and of both, of the node that takes longest. */

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

struct step {
    int count;
    MPI_Request *requests;
    int (*messages)[2];
    int taken;
};

static void fail(const char *what)
{
    fprintf(stderr, "replay: %s\n", what);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static int number(FILE *file, const char *word)
{
    int found;
    if (fscanf(file, word, &found) != 1)
        fail("a schedule that ends too soon");
    return found;
}

static struct step *read_steps(FILE *file, int steps)
{
    struct step *all = calloc(steps + 1, sizeof *all);
    for (int k = 0; k < steps; k++) {
        struct step *step = &all[k];
        for (int part = 0; part < 2; part++) {
            int more = number(file, part ? " sent %d" : " taken %d");
            step->messages = realloc(step->messages, (step->count + more + 1) * sizeof *step->messages);
            for (int i = 0; i < 2 * more; i++)
                step->messages[step->count + i / 2][i % 2] = number(file, " %d");
            step->count += more;
            if (!part)
                step->taken = more;
        }
        step->requests = malloc((step->count + 1) * sizeof *step->requests);
    }
    return all;
}

/* Receives first, as MpiLeaderGroup.persistent_sendrecv. */
static void post(struct step *step, char *buffer)
{
    for (int i = 0; i < step->count; i++) {
        int node = step->messages[i][0], bytes = step->messages[i][1];
        if (i < step->taken)
            MPI_Irecv(buffer, bytes, MPI_BYTE, node, 0, MPI_COMM_WORLD, &step->requests[i]);
        else
            MPI_Isend(buffer, bytes, MPI_BYTE, node, 0, MPI_COMM_WORLD, &step->requests[i]);
    }
}

/* As MPI_Waitall, which takes SimGrid the square of the requests. */
static void finish(struct step *step)
{
    for (int i = 0; i < step->count; i++)
        MPI_Wait(&step->requests[i], MPI_STATUS_IGNORE);
}

static void travel(struct step *all, int steps, int flight, char *buffer)
{
    for (int number = 0; number < steps + flight; number++) {
        if (number < steps)
            post(&all[number], buffer);
        if (number >= flight && number - flight < steps)
            finish(&all[number - flight]);
    }
}

int main(int argc, char **argv)
{
    MPI_Init(&argc, &argv);
    if (argc != 5)
        fail("FOLDER BYTES PUSH PULL expected");
    int node;
    MPI_Comm_rank(MPI_COMM_WORLD, &node);
    char path[4096];
    snprintf(path, sizeof path, "%s/%d.txt", argv[1], node);
    FILE *file = fopen(path, "r");
    if (!file)
        fail("a schedule that is not there");
    int steps = number(file, " steps %d");
    struct step *push = read_steps(file, steps), *pull = read_steps(file, steps);
    fclose(file);
    char *buffer = SMPI_SHARED_MALLOC(atoi(argv[2]) + 1); /* what is in it does not matter */

    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime(), taken[2], longest[2];
    travel(push, steps, atoi(argv[3]), buffer);
    taken[0] = MPI_Wtime() - start;
    travel(pull, steps, atoi(argv[4]), buffer);
    taken[1] = MPI_Wtime() - start;
    MPI_Reduce(taken, longest, 2, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (node == 0)
        printf("%.9f %.9f\n", longest[0], longest[1]);
    MPI_Finalize();
    return 0;
}
