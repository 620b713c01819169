"""A card without a card: tensors that say they lie on ``card:0`` or ``card:1`` and are computed on the CPU.

    with Cards() as watched:
        model.hf_model.to("card:0")          # and everything that is made there says so
        mech.attention_mass(model, inputs, sets)
    watched.launched, watched.waits           # kernels started; times that the host waited for the device
    watched.sent                              # copies to it for which the host waited

What torch refuses on a card is refused here in the same words: an operation whose tensors lie on two devices, with the
exceptions that torch makes (a number on the CPU, indices on the CPU, copies), a CPU generator for a tensor that lies on
a card, and ``numpy()`` of one. So an index that was left on the CPU shows. Values are those of the CPU.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from mech.model.architectures.families import family_of, layers_of

aten = torch.ops.aten
NAME, CPU = "card", torch.device("cpu")
_COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# What reads numbers back to decide something: a kernel and a copy, and the host waits for both.
_WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default,
    aten._unique2.default, aten.unique_dim.default, aten.masked_select.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


class Elsewhere(Tensor):
    """A tensor on a card: a shell around the CPU tensor ``data_here``."""

    data_here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, device: torch.device) -> "Elsewhere":
        shell = Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=device,
        )  # fmt: skip
        shell.data_here = here
        return shell

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __repr__(self, **kwargs: Any) -> str:
        return f"Elsewhere({self.data_here!r}, device='{self.device}')"


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """What torch asks of a kind of device: this one is not there for who looks for an accelerator."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, device_index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


@cache
def _known() -> torch.library.Library:
    """Tell torch the name, once in a process."""
    _setup_privateuseone_for_python_backend(NAME, hook=_Hook())
    library = torch.library.Library("aten", "IMPL")
    # torch.tensor([a, b]) of numbers on a card reads them past every mode.
    library.impl("_local_scalar_dense", lambda value: value.data_here.item(), "PrivateUse1")
    return library


class Cards(TorchDispatchMode):
    """While open, ``card:0`` and ``card:1`` can be named.

    Attributes:
        launched: how often each operation was started on a device that is not the CPU.
        waits: how often the host waited for such a device, by operation.
        sent: how often it waited until something of its own was there, by operation.
        sizes: bytes of what operations there put out, by operation.
    """

    def __init__(self):
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()

    def __enter__(self):
        _known()
        self._before = torch._C._only_lift_cpu_tensors(), torch.autograd.is_multithreading_enabled()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes its tensor here and copies it
        torch.autograd.set_multithreading_enabled(False)  # the threads of a backward do not know these devices
        return super().__enter__()

    def __exit__(self, *raised):
        lifted, threads = self._before
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.autograd.set_multithreading_enabled(threads)
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = _computed(func, args, kwargs or {})
        there = [x for x in _tensors((args, tuple((kwargs or {}).values()))) if isinstance(x, Elsewhere)]
        made = [x for x in _tensors((out,)) if isinstance(x, Elsewhere)]
        name = str(func)
        back = (func in _COPIES and there and not made) or (func is aten.copy_.default and there and args[0].is_cpu)
        if there and (func in _WAITS or back):
            self.waits[name] += 1
        if func in _COPIES and made and any(type(x) is Tensor for x in _tensors(args)):
            self.sent[name] += not (
                (kwargs or {}).get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
            )
        if made and not func.is_view and not name.startswith(("aten.empty", "aten.new_empty", "aten.detach")):
            self.launched[name] += 1
            self.sizes[name] += sum(x.data_here.numel() * x.element_size() for x in made)
        return out


def _computed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if func is aten._fused_sdp_choice.default:  # the kernels of a card have no CPU code: what they compute, written out
        return int(torch.nn.attention.SDPBackend.MATH.value) if not args[0].is_cpu else func(*args, **kwargs)
    home = _home(func, args, kwargs)
    named = kwargs.get("device")
    target = home if named is None else torch.device(named)
    if target.type == NAME and target.index is None:
        target = torch.device(NAME, 0)
    if (generator := kwargs.get("generator")) is not None and generator.device.type != target.type:
        raise RuntimeError(f"Expected a '{target.type}' device type for generator but found '{generator.device.type}'")
    here = {**kwargs, "device": CPU} if named is not None else kwargs
    here = {name: value for name, value in here.items() if name != "pin_memory"} if target != CPU else here
    if func is aten.histc.default and not args[0].is_floating_point():  # which a card counts and a CPU does not
        return Elsewhere(func(_here(args[0]).float(), *args[1:], **here).to(args[0].dtype), target)
    out = func(*_here(args), **{name: _here(value) for name, value in here.items()})
    if (
        func._schema.name.endswith("_") and not func._schema.name.endswith("__") and isinstance(args[0], Tensor)
    ):  # in place
        if isinstance(args[0], Elsewhere) and args[0].shape != args[0].data_here.shape:  # squeeze_ and its like
            args[0].data = Elsewhere(args[0].data_here, args[0].device)
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    if target == CPU:
        return out
    return _there(out, target)


def _here(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.data_here
    return [_here(x) for x in value] if isinstance(value, list | tuple) else value


def _there(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return Elsewhere(value, device)
    return type(value)([_there(x, device) for x in value]) if isinstance(value, list | tuple) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _home(func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.device:
    """The one device of an operation's tensors."""
    if func in _COPIES:
        return args[0].device
    given = list(_tensors((args, tuple(kwargs.values()))))
    if func in _INDEXED:
        indices = {id(x) for x in args[1] if x is not None}
        given = [x for x in given if id(x) not in indices or not x.is_cpu]
    devices = {x.device for x in given if x.ndim or not x.is_cpu}
    if len(devices) > 1:
        one, other = sorted(map(str, devices), reverse=True)[:2]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {one} and {other}! "
            f"(when computing {func})"
        )
    return devices.pop() if devices else CPU


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """The model as ``device_map="auto"`` leaves it on two cards: the second half of the text layers on ``card:1``."""
    layers = list(layers_of(model, family_of(model).text))
    late = set(layers[len(layers) // 2 :])
    places: dict[str, str] = {}

    def place(part: nn.Module, name: str) -> None:
        inside = set(part.modules())
        if part not in layers and not inside.isdisjoint(layers):
            for child, module in part.named_children():
                place(module, f"{name}.{child}".strip("."))
            places.update({f"{name}.{own}".strip("."): f"{NAME}:0" for own in part._parameters | part._buffers})
        else:
            places[name] = f"{NAME}:{int(part in late)}"

    place(model, "")
    if (head := model.get_output_embeddings()) is not None:  # its weights may be those of the embeddings
        name = next(name for name, module in model.named_modules() if module is head)
        if name in places:
            places[name] = f"{NAME}:0"
    return dispatch_model(model, places, main_device=f"{NAME}:0", force_hooks=True)
