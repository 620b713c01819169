"""Open a checkpoint or a given model, or say what is wrong with it.

A folder is checked before weights are loaded: it exists, its architecture is known, and all shards are present and
complete. Weights are safetensors only; code from a checkpoint is never run.
"""

import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mech.errors import InputError, MechError, UnsupportedModel
from mech.files import opened, parse_json, read
from mech.model.architectures.families import RECIPE, PartialSupport, family_of
from mech.model.eager import original
from mech.model.named.projections import accelerate_hook

REFERENCE = "reference:"
INDEX = "model.safetensors.index.json"
MOST_LAYERS = 10_000  # in a config: before weights are read, the model is laid out layer by layer


def resolve(name: str | Path) -> str:
    """The folder of a reference model, the given folder, or a hub id unchanged.

    Raises:
        InputError: the name looks like a folder and there is none.
    """
    name = str(name)
    if name.startswith(REFERENCE):
        from mech.reference import path

        return str(path(name.removeprefix(REFERENCE)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise InputError(f"there is no folder {name!r}", "a folder with config.json, or a hub id like 'owner/model'")
    return name


def _checkpoint(name: str, revision: str | None) -> Path | None:
    """The weights that replace those in a reference model's folder: a revision's, or those it ships; None if none."""
    if not name.startswith(REFERENCE):
        return None
    from mech.reference import changed, checkpoint

    return changed(name) if revision in (None, "main") else checkpoint(name, revision)


def check_folder(folder: Path) -> None:
    """Refuse a folder whose download is incomplete, or whose files are not what their names say.

    Raises:
        UnsupportedModel: no config, no safetensors, a shard missing or shorter than its header says, invalid JSON.
    """
    again = "download it again, for example with `hf download owner/model --local-dir FOLDER`"
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json", "a folder written by save_pretrained", again)
    stored = {}
    for file in (folder / name for name in ("config.json", "generation_config.json", INDEX)):
        if not file.exists():
            continue
        try:
            stored[file.name] = parse_json(read(file))
        except (OSError, ValueError) as error:
            raise UnsupportedModel(f"{file} is cut off or not JSON ({error})", "a complete file", again) from error
        if not isinstance(stored[file.name], dict):
            raise UnsupportedModel(f"{file} holds a {type(stored[file.name]).__name__}", "a JSON object", again)
    names = stored[INDEX].get("weight_map") if INDEX in stored else {"": "model.safetensors"}
    if not isinstance(names, dict) or not all(
        isinstance(filename, str) and filename == Path(filename).name for filename in names.values()
    ):
        raise UnsupportedModel(f"{folder / INDEX} names no files in its folder", "JSON with a weight_map", again)
    shards = sorted(set(names.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UnsupportedModel(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]!r}",
            "every safetensors file the index names (other weight formats are not opened)",
            again,
        )
    for shard in shards:
        if not _is_whole(folder / shard):
            raise UnsupportedModel(f"{folder / shard} is cut off", "all the bytes that its header announces", again)


def _is_whole(shard: Path) -> bool:
    size = shard.stat().st_size
    try:
        with opened(shard) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if 8 + length > size:
                return False
            header = parse_json(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return size == 8 + length + max(ends, default=0)
    except (AttributeError, LookupError, OSError, TypeError, ValueError, struct.error):  # not a safetensors file
        return False


@contextmanager
def no_bars(local: bool = True) -> Iterator[None]:
    """Hide progress bars while reading local files, which is quick; downloads show them."""
    shown = transformers_logging.is_progress_bar_enabled()
    if local:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def known_layout(config: Any) -> PreTrainedModel:
    """The model without weights, on the meta device; refuses an unknown architecture before weights are read.

    Raises:
        UnsupportedModel: the architecture has no row, and its text layers are not laid out like known ones.
    """
    if (layers := max(_layers(config.to_dict()), default=0)) > MOST_LAYERS:
        raise UnsupportedModel(f"a config with {layers} layers", f"at most {MOST_LAYERS}", "check config.json")
    try:
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config)
    except ValueError as error:
        raise UnsupportedModel(
            f"{config.model_type!r} is not a model of images and text: {str(error).splitlines()[0]}",
            "an architecture of AutoModelForImageTextToText",
            RECIPE,
        ) from error
    with warnings.catch_warnings():  # shown once, when the model is wrapped
        warnings.simplefilter("ignore", PartialSupport)
        family_of(empty)
    return empty.eval()


def _layers(config: Mapping[str, Any]) -> Iterator[int]:
    """Every number of layers in a config, however deeply nested."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _layers(value)
        elif isinstance(value, int) and ("layers" in str(name) or name == "depth"):
            yield value


@contextmanager
def _told(what: str, source: str) -> Iterator[None]:
    """Turn any error of transformers, which has no common type for malformed checkpoints, into one that names it.

    Raises:
        UnsupportedModel: whatever went wrong inside.
    """
    try:
        yield
    except MechError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedModel(
            f"the {what} of {source!r} cannot be used ({type(error).__name__}: {reason})",
            "a folder written by save_pretrained", "take all files from the same checkpoint, or download it again",
        ) from error  # fmt: skip


def quantized(bits: str, dtype: torch.dtype | str | None) -> BitsAndBytesConfig:
    """How "8bit" or "4bit" weights are read; activations keep ``dtype``.

    Raises:
        InputError: another value, or bitsandbytes is not installed.
    """
    if bits not in ("8bit", "4bit"):
        raise InputError(f"quantization={bits!r}", "'8bit', '4bit' or None")
    if find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantization={bits!r} without bitsandbytes", "the extra 'quant'", "pip install 'mech[quant]'"
        )
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    wide = dtype if dtype not in (None, "auto") else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=wide)


def _unnumbered(key: str) -> str:
    return re.sub(r"\.\d+\.", ".", key)


def open_checkpoint(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: str | None = None,
) -> tuple[PreTrainedModel, str]:
    """Load a stock Hugging Face model in eval mode; returns it with the folder or hub id it came from.

    Raises:
        InputError: no such folder; options that exclude each other, or need a package that is not installed.
        UnsupportedModel: no such model, no row for it, or weights missing, truncated or of the wrong shape.
    """
    if device is not None and device_map is not None:
        raise InputError("device and device_map", "one of them: device_map says where every part of the model goes")
    source = resolve(name)
    checkpoint = _checkpoint(str(name), revision)
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    placed: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if quantization is not None:
        placed["quantization_config"] = quantized(quantization, dtype)
    if Path(source).is_dir():
        check_folder(Path(source))
    config, _ = _config(source, options)
    with _told("checkpoint", source):
        try:
            with no_bars(Path(source).is_dir()):
                model, report = AutoModelForImageTextToText.from_pretrained(
                    source,
                    config=config,
                    dtype=dtype or "auto",
                    use_safetensors=True,
                    output_loading_info=True,
                    **placed,
                    **options,
                )
            if checkpoint is not None:
                model.load_state_dict(load_file(checkpoint), strict=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise _unopened(source, device_map, str(error).splitlines()[0]) from error
    _check_weights(model, report, source)
    if not placed:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), source


def laid_out(name: str | Path, revision: str | None = None) -> tuple[PreTrainedModel, str]:
    """A stock model built from its config alone, on the meta device, and where it came from; weights are not read.

    Raises:
        InputError: no such folder.
        UnsupportedModel: no config, or no row for it.
    """
    source = resolve(name)
    _checkpoint(str(name), revision)  # refuses a revision that does not exist
    _, empty = _config(source, {"revision": revision or "main", "trust_remote_code": False})
    return empty, source


def _config(source: str, options: Mapping[str, Any]) -> tuple[Any, PreTrainedModel]:
    """The config of a folder or hub id, and the weightless model it describes; refuses an unknown architecture."""
    with _told("config", source):
        try:
            config = AutoConfig.from_pretrained(source, **options)
        except (OSError, ValueError, KeyError) as error:
            known = "model_type" not in str(error) and "does not recognize" not in str(error)
            raise UnsupportedModel(
                f"{source!r} cannot be opened: {str(error).splitlines()[0]}",
                "a folder or hub id with a Hugging Face config of a known architecture",
                "check the name and the network, or give a folder" if known else RECIPE,
            ) from error
        return config, known_layout(config)


def _check_weights(model: PreTrainedModel, report: Mapping[str, Any], source: str) -> None:
    """Refuse a checkpoint that lacks weights, or has weights of layers that the config does not count."""
    absent = sorted(report["missing_keys"])
    if absent:
        raise UnsupportedModel(
            f"{source!r} has no weights for {len(absent)} parameters, first {absent[0]!r}",
            "a complete checkpoint: random weights would be interpreted as if they were trained",
            "download it again, or train it to the end",
        )
    # The same names under another number: layers that the config does not count.
    known = {_unnumbered(key) for key in model.state_dict()}
    if surplus := sorted(key for key in report["unexpected_keys"] if _unnumbered(key) in known):
        raise UnsupportedModel(
            f"the config of {source!r} has no place for {len(surplus)} of its weights, first {surplus[0]!r}",
            "the same number of layers in config.json and in the weights",
            "take config.json and weights from the same checkpoint",
        )


def _unopened(source: str, device_map: Any, what: str) -> UnsupportedModel:
    if device_map is None:
        return UnsupportedModel(f"the weights of {source!r} cannot be opened: {what}", "safetensors of this model")
    return UnsupportedModel(
        f"{source!r} cannot be opened with device_map={device_map!r:.80}: {what}",
        "places that transformers and accelerate can put the weights at",
        "leave device_map out, or try device_map='auto'",
    )


def stock_model(given: Any, weights: bool = True) -> PreTrainedModel:
    """The Hugging Face model inside the given one: compiled, PEFT and data-parallel models are opened.

    Args:
        given: the model.
        weights: whether it must have weights.

    Raises:
        UnsupportedModel: a wrapper around it changes what it computes, or its weights are spread over processes.
    """
    given = original(given)
    mro = {kind.__name__ for kind in type(given).__mro__}
    if mro & {"FullyShardedDataParallel", "FSDPModule"} or any(
        type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id") for parameter in given.parameters()
    ):
        raise UnsupportedModel(
            f"a {type(given).__name__} whose weights are spread over processes (FSDP, tensor parallelism, ZeRO-3)",
            "a model whose weights are whole", "save it, and open it in one process; device_map spreads it over GPUs",
        )  # fmt: skip
    if isinstance(given, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return stock_model(given.module)
    if mro & {"PeftModel", "PeftMixedModel"}:
        return stock_model(_without_prompts(given))
    if weights and (name := _nowhere(given)):
        raise UnsupportedModel(
            f"a {type(given).__name__} without weights: {name!r} is on the meta device, and nothing loads it",
            "weights in memory, or offloaded by accelerate", "open it without device_map, or with device_map='auto'",
        )  # fmt: skip
    return given


def _nowhere(module: nn.Module, path: str = "") -> str:
    """The name of a parameter that has no values and will get none from accelerate; "" if there is none."""
    brought = accelerate_hook(module)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta and not (brought and brought.offload):
            return path + name
    return next(filter(None, (_nowhere(part, f"{path}{name}.") for name, part in module.named_children())), "")


def _without_prompts(given: Any) -> Any:
    """The model inside a ``PeftModel`` whose adapters are in its layers.

    Raises:
        UnsupportedModel: an adapter is applied around the model, and would be missing inside.
    """
    from peft.tuners.tuners_utils import BaseTuner

    configs = [given.peft_config[name] for name in given.active_adapters]
    outside = type(given.base_model).forward is not BaseTuner.forward
    outside |= any(config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None) for config in configs)
    if outside:
        kind = configs[0].peft_type.value if configs else type(given.base_model).__name__
        raise UnsupportedModel(
            f"a {type(given).__name__} with {kind}, which is applied around the model, not in its layers",
            "adapters in the layers, such as LoRA, DoRA or IA3", "take peft_model.get_base_model() for the model alone",
        )  # fmt: skip
    return given.get_base_model()
