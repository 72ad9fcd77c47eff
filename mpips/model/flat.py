"""The flat buffer: all trainable parameters are views of one contiguous tensor, and their gradients of another.

A parameter keeps its slot for the whole run. Slots begin on 64-byte boundaries, as torch's own allocations do. So kernels take
the same code path, and give the same bits, as on parameters that were allocated one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from mpips.model.finite import all_finite, is_finite

_registered = [0]  # parameters and modules registered in this process so far


def _count(*_: object) -> None:
    _registered[0] += 1


register_module_parameter_registration_hook(_count)
register_module_module_registration_hook(_count)

ALIGNMENT = 64  # bytes
STORED = {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
STORED |= {torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64}
WRAPPERS = {"module", "_orig_mod", "_module"}  # DDP and DataParallel, torch.compile, Opacus


class LayoutError(ValueError):
    """A model that cannot be laid out flat. The message names the tensor and a remedy."""


@dataclass(frozen=True)
class Slot:
    """One tensor's place in the flat buffer, in elements."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    numel: int

    @property
    def span(self) -> slice:
        """The slice of the flat buffer."""
        return slice(self.offset, self.offset + self.numel)

    def view(self, flat: Tensor) -> Tensor:
        """Return this slot of `flat` as a view with the tensor's own shape and strides."""
        return self.shaped(flat[self.span])

    def shaped(self, part: Tensor) -> Tensor:
        """Return `part`, `(numel,)`, as a view with the tensor's own shape and strides."""
        return part.as_strided(self.shape, self.stride, part.storage_offset())


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside DDP, `torch.compile` and other wrappers, so that names have no prefix."""
    while True:
        children = dict(model.named_children())
        own = [*model.parameters(recurse=False), *model.buffers(recurse=False)]
        if own or len(children) != 1 or not WRAPPERS & children.keys():
            return model
        model = next(iter(children.values()))


def clean(name: str) -> str:
    """Return a parameter's name without the prefixes of submodules that were compiled."""
    return name.replace("_orig_mod.", "")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides to keep: the tensor's own if the tensor is dense (as in channels-last), else row-major ones."""
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()


def lay_out(named: Iterable[tuple[str, Tensor]]) -> tuple[list[Slot], int]:
    """Return slots for the named tensors, in order, and the total length in elements."""
    slots, end = [], 0
    for name, tensor in named:
        slots.append(Slot(name, tensor.shape, _strides(tensor), end, tensor.numel()))
        step = max(1, ALIGNMENT // tensor.element_size())
        end += -(-tensor.numel() // step) * step
    return slots, end


WATCHED = {2, *(16**k for k in range(12))}  # calls of `note_weights` that take digests; the first call comes before any round


class Flat:
    """A model's trainable parameters in one flat tensor.

    Attributes:
        model: the module that has the parameters, without wrappers.
        parameters: the trainable parameters, each once, in the order of the slots.
        frozen: name -> parameter, for those that are not trained.
        aliases: further name -> first name, for tied parameters.
        slots: the places of the parameters.
        weights: `(numel,)`, in the model's dtype; every parameter's data is a view of it.
        renormalised: the indices of the parameters that an embedding with `max_norm` changes in forward.
        dtype, device: the parameters'.
        watch: called with a parameter's index whenever backward has accumulated its gradient; None for no call.
        grad: `(numel,)`, in the model's dtype; every parameter's `.grad` is a view of it from backward to `clear`.
    """

    def __init__(self, model: nn.Module, hold: bool = True) -> None:
        """Lay out the parameters.

        Args:
            model: the module.
            hold: whether to move the parameters into newly allocated memory. If not, call `attach_weights` and `attach_grad`
                before anything else.
        """
        self.model = unwrap(model)
        _check_plain(self.model)
        self.aliases = _aliases(self.model)
        named = [(clean(n), p) for n, p in self.model.named_parameters() if p.requires_grad]
        _check(named)
        _check_apart(self.model)
        self.frozen = {clean(n): p for n, p in self.model.named_parameters() if not p.requires_grad}
        self.parameters: list[nn.Parameter] = [p for _, p in named]
        self.slots, self.numel = lay_out(named)
        first = self.parameters[0]
        self.dtype, self.device = first.dtype, first.device
        self._touched: set[int] = set()
        self._views: list[Tensor] = []
        self._places: list[int] = []  # the data pointer that each parameter must have
        self.watch: Callable[[int], None] | None = None
        self._checked = -1  # the count of registrations at the last check of the whole model
        self._versions: list[int] = []
        self._sums: list[int] = []
        self._noted = 0
        self._frozen_digests: dict[str, int] = {}
        limited = [m for m in self.model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None]
        tables: set[Tensor] = {m.weight for m in limited}
        self.renormalised = {number for number, p in enumerate(self.parameters) if p in tables}
        self.sparse = False  # whether sparse gradients are left as they are
        self.averaged = False  # whether the gradients are averages over all workers
        self.accumulated = False  # whether backward has accumulated a gradient since this was set to False
        self._left_at = -1  # the version counter of the flat gradient after the last accumulation
        self.dropped = False  # whether the script has removed gradients that were pending, before the last backward
        self._left: dict[int, int] = {}  # digests of gradients as backward has left them
        self._hooked: int | None = None  # a parameter whose gradient a hook of the script's has changed
        self._spent: set[int] = set()  # the parameters whose gradient was not there any more after a step, see `spend`
        for number, p in enumerate(self.parameters):
            p.register_post_accumulate_grad_hook(partial(self._accumulated, number))  # type: ignore[no-untyped-call]
        if hold:
            self.attach_weights(self.zeros())
            self.attach_grad(self.zeros(), keep=True)

    def zeros(self) -> Tensor:
        """Return a flat tensor of zeros, `(numel,)`, in the model's dtype."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def attach_weights(self, flat: Tensor) -> None:
        """Copy the weights to `flat` (`(numel,)`, the model's dtype) and make the parameters views of it."""
        for slot, p in zip(self.slots, self.parameters, strict=True):
            view = slot.view(flat)
            view.copy_(p.data)
            p.data = view  # one by one, so that old memory is freed on the way
        self._hold(flat)

    def gathered(self) -> Tensor:
        """Return the weights, `(numel,)`, after copying back parameters whose data the script has replaced."""
        for slot, p in zip(self.slots, self.parameters, strict=True):
            slot.view(self.weights).copy_(p.data)
        return self.weights

    def rehang_weights(self, flat: Tensor) -> None:
        """Make the parameters views of `flat`, which holds the weights already."""
        for slot, p in zip(self.slots, self.parameters, strict=True):
            p.data = slot.view(flat)
        self._hold(flat)

    def _hold(self, flat: Tensor) -> None:
        """Note that the parameters are views of `flat`."""
        self.weights = flat
        self._places = [p.data_ptr() for p in self.parameters]

    def attach_grad(self, flat: Tensor, keep: bool = False) -> None:
        """Let gradients accumulate in `flat` (`(numel,)`, the model's dtype). Unless `keep`, clear present gradients."""
        self.grad = flat
        self._views = [slot.view(flat) for slot in self.slots]
        if not keep:  # gradients are recognised by object identity
            self.clear()

    def views_of(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's view of `flat`; for the flat gradient, the very objects that are in `p.grad`."""
        return self._views if flat.data_ptr() == self.grad.data_ptr() else [slot.view(flat) for slot in self.slots]

    def take_out(self, members: Collection[int]) -> dict[int, Tensor]:
        """Take out the gradients of all parameters except `members`; return copies by index."""
        taken = {}
        for number, p in enumerate(self.parameters):
            if p.grad is not None and number not in members:
                taken[number], p.grad = p.grad.detach().clone(), None
        return taken

    def put_back(self, gradients: Mapping[int, Tensor], used: Collection[int] = ()) -> None:
        """Give parameters back the gradients that `take_out` returned. Those of the parameters `used` are pending no more."""
        for number, gradient in gradients.items():
            sparse = gradient.layout is not torch.strided  # of SparseAdam, which needs it as it is
            self.parameters[number].grad = gradient if sparse else self._views[number].copy_(gradient)
            if number not in used:
                self._touched.add(number)

    def clear(self) -> None:
        """Set every gradient to None. The flat gradient keeps its contents; the next backward overwrites them."""
        self._touched.clear()
        self._left.clear()
        for p in self.parameters:
            p.grad = None

    def spend(self, numbers: Iterable[int] | None = None) -> None:
        """Mark gradients whose memory a step has used for something else. The first element is NaN until they are zeroed.

        So a script that zeroes gradients does so as in one process, and one that uses them again is found out.

        Args:
            numbers: the indices of the parameters; None for all that have a gradient, none of which is pending then.
        """
        if numbers is None:
            self._touched.clear()
            self._left.clear()
            numbers = [number for number, p in enumerate(self.parameters) if p.grad is not None]
        at = [self.slots[number].offset for number in numbers if self.parameters[number].numel()]
        if at:
            self.grad.index_fill_(0, torch.tensor(at, device=self.device), math.nan)
        for number in numbers:
            self.parameters[number].grad = self._views[number]
        self._spent.update(numbers)

    def spent(self) -> set[int]:
        """Return the indices of the parameters whose gradient is spent, and not zeroed since; see `spend`."""
        if self._spent:
            held = [n for n in self._spent if self.parameters[n].grad is self._views[n] and self.parameters[n].numel()]
            marked = self.grad[[self.slots[number].offset for number in held]].isnan().tolist()
            self._spent = {number for number, nan in zip(held, marked, strict=True) if nan}
        return self._spent

    def check_spent(self, members: Collection[int] | None = None) -> None:
        """Raise RuntimeError for gradients that are to be used again, or were added to, and are spent.

        Args:
            members: the indices of the parameters whose gradients are used; None for all.
        """
        for number in sorted(self.spent() if members is None else self.spent() & set(members)):
            raise RuntimeError(
                f"the gradient of {self.slots[number].name} from before the last step is to be used again, and is not there: "
                f"the step has used its memory on this rank, or it is not in the checkpoint; expected optimizer.zero_grad() "
                f"between a step and the next backward, and one step for a gradient"
            )

    @contextmanager
    def without_spent(self) -> Iterator[None]:
        """Take spent gradients for absent within the context."""
        spent = sorted(self.spent())
        for number in spent:
            self.parameters[number].grad = None
        yield
        self.spend(spent)

    def _accumulated(self, number: int, p: nn.Parameter) -> None:
        """Copy a gradient that autograd has just accumulated into the flat buffer, while the gradient is still in the cache."""
        self.averaged, self.accumulated = False, True
        if number in self._touched and p.grad is not self._views[number] and p.grad is not None:
            # With create_graph torch makes new gradients; sparse ones are never views.
            self.dropped |= not p.grad.requires_grad and p.grad.layout is torch.strided
        self._touched.add(number)
        if self.sparse and p.grad is not None and p.grad.is_sparse:
            return
        if p.grad is not self._views[number]:
            self._spent.discard(number)
            self._bring(number, p)
        self._left_at = self.grad._version
        if self._sums:
            self._left[number] = _digest(self._views[number])
        if self.watch:
            self.watch(number)

    def take_average(self, gradients: Tensor, present: Sequence[float]) -> None:
        """Set the gradients to the average over all workers.

        Args:
            gradients: `(numel,)`, the averaged gradients.
            present: for each parameter, the number of workers with a gradient. The gradient of a parameter without any is None.
        """
        if gradients.data_ptr() != self.grad.data_ptr():
            self.grad.copy_(gradients)
        for number, (p, view, seen) in enumerate(zip(self.parameters, self._views, present, strict=True)):
            p.grad = view if seen else None
            if seen:
                self._touched.add(number)
        self.averaged = True

    @property
    def examined(self) -> bool:
        """Whether `changed_gradient` has something to look at."""
        return bool(self._left)

    def _watch_hooks(self) -> None:
        """Let the script's hooks on parameters (`Tensor.register_hook`) be compared with what they are given."""
        for number, p in enumerate(self.parameters):
            for key, hook in (p._backward_hooks or {}).items():
                if getattr(hook, "func", None) != self._call_hook:
                    p._backward_hooks[key] = partial(self._call_hook, number, hook)  # type: ignore[index]

    def _call_hook(self, number: int, hook: Callable[[Tensor], Tensor | None], gradient: Tensor) -> Tensor | None:
        """Call a hook of the script's; in watched rounds note whether it changes the gradient."""
        watched = self._sums and gradient.layout is torch.strided
        before = _digest(gradient) if watched else 0
        changed = hook(gradient)
        if watched and _digest(gradient if changed is None else changed) != before:
            self._hooked = number
        return changed

    def changed_gradient(self) -> int | None:
        """Return the index of a parameter whose gradient the script has changed, itself or by a hook; None if there is none.

        It is looked for in the rounds in which digests of the weights are taken, see `note_weights`.
        """
        left, self._left = self._left, {}
        hooked, self._hooked = self._hooked, None
        if self.averaged or hooked is not None:
            return hooked
        for number, digest in left.items():
            gradient = self.parameters[number].grad
            if gradient is not None and number in self._touched and _digest(gradient) != digest:
                return number
        return None

    def collect(self) -> list[bool]:
        """Copy gradients that autograd or the user has put elsewhere back into the flat buffer.

        `zero_grad(set_to_none=True)` and an assignment to `p.grad` both separate a gradient from its view.

        Returns:
            For each parameter, whether it has a gradient in this step.

        Raises:
            LayoutError: a parameter is no longer a view of the flat weights, so no step would reach it.
        """
        self._check_still_ours()
        present = []
        for number, (p, view, place) in enumerate(zip(self.parameters, self._views, self._places, strict=True)):
            if p.data_ptr() != place:
                raise LayoutError(
                    f"{self.slots[number].name} has left the flat buffer; move or cast the model and assign to p.data before "
                    f"connect, not after it"
                )
            present.append(p.grad is view or self._bring(number, p))
        return present

    def _bring(self, number: int, p: nn.Parameter) -> bool:
        """Copy a gradient that lies elsewhere into the flat buffer; return whether there is one."""
        view, grad = self._views[number], p.grad
        if grad is None:
            view.zero_()
            return False
        strided = grad.layout is torch.strided
        if not strided or grad.data_ptr() != view.data_ptr():
            dense = grad if strided else grad.to_dense()
            view.copy_(dense.detach() if dense.requires_grad else dense)  # as with create_graph
        p.grad = view
        return True

    def bring(self, gradients: list[Tensor]) -> None:
        """Copy those gradients that the script has assigned to `p.grad` into the flat buffer, and replace them by its views."""
        own = self.grad.untyped_storage().data_ptr()  # in which the server's clipping has views of its own
        grads = {id(p.grad): (number, p.grad) for number, p in enumerate(self.parameters) if p.grad is not None}
        for place, gradient in enumerate(gradients):
            number, grad = grads.get(id(gradient), (0, None))
            if grad is not None and grad.layout is torch.strided and grad.untyped_storage().data_ptr() != own:
                self._bring(number, self.parameters[number])
                self._touched.add(number)
                gradients[place] = self._views[number]

    def _check_still_ours(self) -> None:
        """Raise LayoutError unless the model still trains the parameters it had at `connect`.

        The whole model is examined only at the first step and after a module or parameter has been registered.
        """
        for name, p in self.frozen.items() if self.frozen else ():
            if p.requires_grad:
                raise LayoutError(f"after connect {name} was unfrozen; freeze and unfreeze parameters before connect")
        if self._checked == _registered[0]:
            return
        ours = set(self.parameters)  # of which some may be frozen for a while
        now = [(clean(n), p) for n, p in self.model.named_parameters() if p.requires_grad or p in ours]
        expected = [(slot.name, p) for slot, p in zip(self.slots, self.parameters, strict=True)]
        for (name, parameter), (other, current) in zip_longest(expected, now, fillvalue=("nothing", None)):
            if parameter is not current:
                raise LayoutError(
                    f"after connect the model trains {other} where it trained {name}; replace, freeze and unfreeze parameters, "
                    f"and load_state_dict(assign=True), before connect"
                )
        self._checked = _registered[0]

    def note_frozen(self) -> None:
        """Note that the frozen parameters agree with the server's."""
        self._frozen_digests = {name: _digest(p) for name, p in self.frozen.items()}

    def changed_frozen(self) -> dict[str, Tensor]:
        """Return the frozen parameters that the script has changed since `note_frozen`, such as a momentum teacher's."""
        return {name: p.data for name, p in self.frozen.items() if _digest(p) != self._frozen_digests.get(name)}

    def note_weights(self, moved: bool, members: Collection[int] | None = None, others: bool = False) -> None:
        """Note that the weights agree with the server's, as the reference for `changed_weights`.

        Autograd's version counters miss what is written through `p.data`. So digests of the weights are taken as well, but
        rarely: at `connect` and after rounds 1, 15, 255, ... A script that writes in every step is found at the first.

        Args:
            moved: whether mpips has changed the weights. Autograd's version counters are then incremented, as after any change
                in place.
            members: the indices of the parameters that were stepped; None for all.
            others: whether the weights are stepped on another rank, where a change by the script would be lost.
        """
        self._noted += 1
        self._sums = self.sums() if others and self._noted in WATCHED else []
        if self._sums:
            self._watch_hooks()
        if moved:
            stepped = self.parameters if members is None else [self.parameters[number] for number in members]
            torch.autograd.graph.increment_version(stepped)
        self._versions = list(map(_version, self.parameters))

    def sums(self) -> list[int]:
        """Return a digest of each parameter."""
        return [_digest(p) for p in self.parameters]

    def changed_weights(self) -> list[int]:
        """Return the indices of the parameters that the script has changed in place since `note_weights`."""
        now = list(map(_version, self.parameters))
        if self._sums and self._sums != (sums := self.sums()):
            return [n for n, (a, b) in enumerate(zip(sums, self._sums, strict=True)) if a != b]
        if now == self._versions or not self._versions:
            return []
        return [n for n, (a, b) in enumerate(zip(now, self._versions, strict=True)) if a != b]

    def resume(self, gradients: Mapping[str, Tensor]) -> None:
        """Restore gradients, by name, that were accumulated but not pushed."""
        self._left.clear()
        for number, (slot, p) in enumerate(zip(self.slots, self.parameters, strict=True)):
            if slot.name in gradients:
                p.grad = slot.view(self.grad).copy_(gradients[slot.name])
                self._touched.add(number)
                self.accumulated = True

    def held(self, values: Tensor) -> list[tuple[int, bool]]:
        """Return the parameters that have a gradient which is not pending: their indices, and whether it is zero.

        Args:
            values: `(numel,)`, what the flat gradient holds, or is to hold again.
        """
        found = []
        for number, (p, slot, view) in enumerate(zip(self.parameters, self.slots, self._views, strict=True)):
            if p.grad is not None and number not in self._touched:
                grad = slot.view(values) if p.grad is view else p.grad
                found.append((number, not (grad.to_dense() if grad.is_sparse else grad).any()))
        return found

    def hold(self, held: Iterable[Sequence[int]]) -> None:
        """Give the parameters that `held` returned a gradient again: zeros, with which a step may be taken, or a spent one."""
        held = [(int(number), bool(zero)) for number, zero in held]
        self.spend([number for number, zero in held if not zero])
        for number, zero in held:
            if zero:
                self.parameters[number].grad = self._views[number].zero_()

    def pushed(self) -> None:
        """Note that the gradients have been pushed; none is pending."""
        self._touched.clear()

    @property
    def pending(self) -> bool:
        """Whether backward has accumulated gradients that have not been pushed."""
        return bool(self._touched)

    def unpushed(self, values: Tensor) -> dict[str, Tensor]:
        """Return the gradients by name that backward has accumulated and that have not been pushed, as views of `values`."""
        return {slot.name: slot.view(values) for number, slot in enumerate(self.slots) if number in self._touched}

    def gradients(self) -> list[Tensor]:
        """Return the gradients that are not None."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def numbers(self, gradients: Iterable[Tensor]) -> list[int]:
        """Return the indices of those parameters whose gradient's view is among `gradients`."""
        given = set(map(id, gradients))
        return [number for number, view in enumerate(self._views) if id(view) in given]

    def holds(self, gradient: Tensor) -> bool:
        """Return whether `gradient` is one of the flat gradient's views."""
        return any(gradient is view for view in self._views)

    def trains(self, p: Tensor) -> bool:
        """Return whether `p` is one of the parameters."""
        return any(p is own for own in self.parameters)

    def any_gradient(self) -> bool:
        """Return whether a gradient is pending that the script has neither removed nor zeroed; backward may have left zeros."""
        as_left = self.grad._version == self._left_at
        grads = (self.parameters[number].grad for number in self._touched)
        return any(grad is not None and (as_left or bool(grad.any())) for grad in grads)

    def first_nonfinite(self, flat: Tensor) -> int | None:
        """Return the index of the first slot of `flat` that holds a NaN or Inf, or None."""
        if is_finite(flat):
            return None
        return next((i for i, slot in enumerate(self.slots) if not all_finite(slot.view(flat))), None)

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator over the names of the slots and their views of `flat`."""
        return ((slot.name, slot.view(flat)) for slot in self.slots)


_version = attrgetter("_version")


def _digest(tensor: Tensor) -> int:
    """Return a sum of a tensor's bits, which almost certainly changes if the tensor does."""
    words = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = words.clone() if words.storage_offset() % 8 else words  # an unaligned view
    whole = len(words) // 8 * 8
    return int(words[:whole].view(torch.int64).sum()) + int(words[whole:].sum())


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return further name -> first name, for tied parameters."""
    first: dict[nn.Parameter, str] = {}
    aliases = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p in first:
            aliases[clean(name)] = first[p]
        else:
            first[p] = clean(name)
    return aliases


def _check(named: list[tuple[str, nn.Parameter]]) -> None:
    """Raise LayoutError unless the parameters can share one buffer."""
    if not named:
        raise LayoutError("the model has no trainable parameter; expected at least one with requires_grad=True")
    name, first = named[0]
    for other, p in named:
        if not p.dtype.is_floating_point or p.element_size() < 2:
            raise LayoutError(f"{other} is {p.dtype}; trainable parameters must be float16, bfloat16, float32 or float64")
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise LayoutError(
                f"{other} is {p.dtype} on {p.device}, {name} is {first.dtype} on {first.device}; one flat buffer holds one "
                f"dtype on one device: cast or move the model, or freeze one of them with requires_grad_(False)"
            )


def _check_plain(model: nn.Module) -> None:
    """Raise LayoutError if a parameter or persistent buffer is not a dense tensor that can be sent, saved and written."""
    persistent = model.state_dict(keep_vars=True).keys()
    named = [("parameter", name, p) for name, p in model.named_parameters()]
    named += [("buffer", name, b) for name, b in model.named_buffers() if name in persistent]  # type: ignore[misc]
    for kind, name, tensor in named:
        if why := _not_plain(tensor):
            constant = ", or register it with persistent=False, as a constant that is neither sent nor saved"
            raise LayoutError(f"{kind} {clean(name)} {why}{constant if kind == 'buffer' else ''}")


def _not_plain(tensor: Tensor) -> str:
    """Return what is unusual about a tensor and a remedy, to follow its name; empty for dense memory of its own."""
    if is_lazy(tensor):
        return "has no shape yet; before connect, and before the optimizer is made, run one batch through the model"
    if tensor.is_meta:
        return (
            "is on the meta device, without values; give it some before connect, by model.to_empty(device=...) and its weights"
        )
    if tensor.is_nested:
        return "is a nested tensor; expected a dense one: pad it, or give its parts names of their own"
    if tensor.is_quantized:
        return f"is quantised, {tensor.dtype}; expected a plain tensor: hold its int_repr(), scale and zero point apart"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; expected a dense tensor: give .to_dense()"
    if tensor.dtype not in STORED:
        hint = "give torch.view_as_real() of it" if tensor.is_complex() else "cast it"
        return f"is {tensor.dtype}, of which there are no sums and checkpoints: {hint}"
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "is expanded, so that elements share a place in memory; expected elements of their own: give .clone()"
    return ""


def _check_apart(model: nn.Module) -> None:
    """Raise LayoutError if a trainable parameter, which will be moved, shares memory with another tensor of the model."""
    tensors = [(clean(n), t) for n, t in [*model.named_parameters(), *model.named_buffers()] if not _not_plain(t) and t.numel()]
    for (name, one), (other, two) in pairwise(sorted(tensors, key=lambda item: item[1].data_ptr())):
        if (one.requires_grad or two.requires_grad) and _overlap(one, two):
            raise LayoutError(
                f"{name} and {other} share memory but are two tensors; tie them by assigning one Parameter to both places"
            )


def _overlap(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors share memory. `two` does not begin before `one`. Strided slices may interleave."""
    if all(torch.ops.aten.is_non_overlapping_and_dense(t) for t in (one, two)):
        return two.data_ptr() < one.data_ptr() + one.numel() * one.element_size()
    return one.data_ptr() == two.data_ptr()
