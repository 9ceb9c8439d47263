"""The base that adapters were trained on: its linear layers quantised to NF4 and dequantised once, kept on this node.

    W' = dequantise(quantise(W))    of each layer that training holds in NF4 (``architecture.nf4_layers``), W elsewhere

NF4 in blocks of 64 with double quantisation (Dettmers et al. 2023, section 3, https://arxiv.org/abs/2305.14314), done
by the same functions of bitsandbytes, from weights and to weights of the compute dtype, as when training loads the
base. An adapter has learnt to correct W', not W: served on W' it meets the weights that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import Fault, InputError, MachineError
from cluster.folder_cache import cache_root, locked, mark_used, remove, remove_oldest, write_whole
from cluster.schema import is_local
from cluster.storage import disk_trouble, free_gib
from serving.engine import engine_dtype
from serving.weights.architecture import Source, build_on_meta, nf4_layers, reason, weights_identity

if TYPE_CHECKING:
    import torch

    from serving.spec import ServeSpec

KEPT = 2
"""Dequantised bases on a node: each takes as much room as the base in 16 bits."""
LOCK_S = 3600.0
"""A start waits so long for another one to write the same base: a large one takes minutes to quantise on CPUs."""
SPARE_GIB = 1.0
"""Left free on the disk, for all that others write there."""
_BESIDE = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
"""Kinds of files beside the weights: tokenizer, template, code."""
_INDEX = ".index.json"
Dtype = Literal["bfloat16", "float32"]
Progress = Callable[[str], None]


def dequantized_base(source: Source, dtype: Dtype = "bfloat16", progress: Progress = lambda _: None) -> Path:
    """The folder of the base of ``source`` with its linear layers quantised to NF4 and dequantised, in Hugging Face's
    format, with the base's tokenizer; from this node's cache, or made now.

    A start that finds another one at work on the same base waits for its result. The folder is whole or not there. The
    ``KEPT`` ones used last are kept: whoever goes on needing it calls ``mark_used`` now and then. It takes the base's
    memory in ``dtype`` to make, and minutes for a large base.

    Args:
        source: The base. One whose weights are NF4 already is dequantised as it is.
        dtype: Compute dtype of the training, in which the weights are quantised and written.
        progress: Called with a line for people before it is made.

    Raises:
        InputError: as ``architecture.build_on_meta`` (no such base, a quantisation that is not NF4); or its weights
            cannot be read.
        MachineError: no room on the disk of the cache, or it cannot be written, or another start is stuck.
    """
    outline = build_on_meta(source)
    folder = cache_root("dequantized") / _key(source, dtype)
    with disk_trouble("the cache of dequantised bases", folder), locked(folder, LOCK_S) as is_held:
        if not is_held:
            raise MachineError(f"{folder}: another process has been making it for {LOCK_S:.0f} s; end that one")
        if folder.is_dir() and not _is_readable(folder):
            remove(folder)
        if not folder.is_dir():
            remove_oldest(folder.parent, KEPT - 1)
            _require_room(folder.parent, outline, dtype)
            progress(f"quantising {source.model} to NF4 and back, once on this node")
            write_whole(folder, lambda path: _write(source, dtype, path))
        mark_used(folder)
    return folder


def engine_spec(spec: ServeSpec, progress: Progress = lambda _: None) -> ServeSpec:
    """``spec`` as the engine is to be started: where ``serve_base`` is ``dequantized`` its base is that folder, under
    the same name; else as it is. What clients and the registry are told of the base comes from ``spec`` itself.

    Raises:
        InputError, MachineError: as ``dequantized_base``.
    """
    if spec.serve_base == "plain":
        return spec
    # The trainer has these two only.
    dtype = "float32" if engine_dtype(spec) == "float32" else "bfloat16"
    folder = dequantized_base(spec.base, dtype, progress)
    base = spec.base.model_copy(update={"model": str(folder), "revision": None, "name": spec.base.served_name})
    return spec.model_copy(update={"base": base})


def _key(source: Source, dtype: str) -> str:
    """What the folder depends on, as a name: all files of the base, what quantises them, on which kind of device."""
    files: object = weights_identity(source)
    if is_local(source.model):
        paths = sorted(path for path in Path(source.model).iterdir() if path.is_file())
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    versions = [f"{name} {version(name)}" for name in ("bitsandbytes", "transformers", "torch")]
    parts = json.dumps([source.model, source.revision, files, dtype, _device(), *versions])
    return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()


def _device() -> str:
    """bitsandbytes has a kernel for each kind, which need not round alike; training prefers GPUs too."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_readable(folder: Path) -> bool:
    """False if a file of weights was damaged since: its length does not agree with its header."""
    from safetensors import SafetensorError, safe_open

    weights = list(folder.glob("*.safetensors"))
    try:
        for path in weights:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, SafetensorError):
        return False
    return bool(weights)


def _require_room(root: Path, outline: Any, dtype: Dtype) -> None:
    size = 4 if dtype == "float32" else 2
    need = sum(parameter.numel() for parameter in outline.parameters()) * size / 2**30 + SPARE_GIB
    free = free_gib(root)
    if free < need:
        raise MachineError(
            f"serve_base: {root} has {free:.1f} GiB free, but the dequantised base needs {need:.1f} GiB; "
            "free some, set XDG_CACHE_HOME to a larger disk, or serve_base: plain"
        )


def _write(source: Source, dtype: str, folder: Path) -> None:
    """Everything beside the weights as the base has it, then what transformers saves."""
    folder.mkdir(parents=True)
    for path in sorted(_beside(source).iterdir()):
        if path.is_file() and path.suffix in _BESIDE and not path.name.endswith(_INDEX):
            shutil.copyfile(path, folder / path.name)
    model = _dequantised(source, dtype)
    model.save_pretrained(folder)


def _beside(source: Source) -> Path:
    """A folder with the base's files beside the weights; those of a hub id are fetched."""
    if is_local(source.model):
        return Path(source.model)
    from huggingface_hub import snapshot_download

    kinds = [f"*{kind}" for kind in _BESIDE]
    return Path(snapshot_download(source.model, revision=source.revision, allow_patterns=kinds))


def _dequantised(source: Source, dtype: str) -> Any:
    """The transformers model, in host memory; one layer at a time is on the accelerator."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.model,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=getattr(torch, dtype),
            device_map={"": "cpu"},
        ).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            [Fault("base.model", f"must have weights that can be read ({reason(error)})", source.model)]
        ) from None
    if getattr(model, "hf_quantizer", None) is not None:
        return _as_plain(source, model, getattr(torch, dtype))
    for name in nf4_layers(model):
        layer = model.get_submodule(name)
        layer.weight.data = through_nf4(layer.weight.data, is_transposed=_is_transposed(layer))
    return model


def through_nf4(weight: torch.Tensor, *, is_transposed: bool = False) -> torch.Tensor:
    """``weight`` (out, in), or (in, out) where ``is_transposed``, quantised to NF4 and dequantised.

    Shape, dtype and device stay. Blocks of 64 run along the inputs, as in bitsandbytes' ``Linear4bit``.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = (weight.T if is_transposed else weight).contiguous().to(_device())
    packed, state = quantize_4bit(rows, blocksize=64, compress_statistics=True, quant_type="nf4")
    back = dequantize_4bit(packed, state).to(weight.device, weight.dtype)
    return back.T.contiguous() if is_transposed else back


def _is_transposed(layer: Any) -> bool:
    """True for GPT-2's linear layer, which keeps its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _as_plain(source: Source, model: Any, dtype: torch.dtype) -> Any:
    """A model without quantisation that has the weights of ``model``, which came in NF4."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM

    model.hf_quantizer.remove_quantization_config(model)
    with torch.device("meta"):  # its own way of saving: that of ``model`` is for packed weights
        plain: Any = AutoModelForCausalLM.from_config(model.config, trust_remote_code=source.trust_remote_code)
    weights: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            packed: Any = module.weight
            weight = dequantize_4bit(packed.data, packed.quant_state).to(dtype)
            is_transposed = _is_transposed(plain.get_submodule(name))
            weights[f"{name}.weight"] = weight.T.contiguous() if is_transposed else weight
    plain.load_state_dict(
        {name: weights[name] for name in plain.state_dict() if name in weights}, strict=False, assign=True
    )
    plain.tie_weights()
    assert not any(parameter.is_meta for parameter in plain.parameters())  # noqa: S101 - a bug of ours
    return plain
