"""A base without its weights: found, built on the meta device, which takes no memory, and its linear layers.

What transformers and bitsandbytes will do with a base is asked of their own functions where they have one, so that what
is foretold here is what is then loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cluster.errors import Fault, InputError
from cluster.schema import is_local

PERMUTED = frozenset({"xlnet"})
"""Causal language models by transformers' list whose attention sees the tokens to come unless a mask is given."""


class Source(Protocol):
    """Where a base comes from: the fields that a sweep's base, a server's base and ``ModelSource`` share."""

    @property
    def model(self) -> str:
        """Folder or hub id."""
        ...

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of a hub id."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """Whether Python code that comes with the model may run."""
        ...


class ModelSource(NamedTuple):
    """A base outside of any configuration file."""

    model: str
    """Folder or hub id."""
    revision: str | None = None
    trust_remote_code: bool = False


def reason(error: BaseException) -> str:
    """What a library says of a failure, as one line."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    text = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    told = isinstance(error, (OSError, ValueError, ImportError)) and text
    return text.rstrip(".") if told else f"{type(error).__name__}: {text}".rstrip(": .")


def is_causal_class(config: Any) -> bool:
    """True if transformers, or code that comes with the model, has a causal language model for ``config``."""
    return has_class(config) or brings_code(config)


def has_class(config: Any) -> bool:
    """True if transformers itself has a causal language model for ``config``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def brings_code(config: Any) -> bool:
    """True if the model's class is Python code that comes with the model."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def other_task(config: Any) -> Iterator[str]:
    """Why a model is no causal language model although transformers would build and load one from ``config``: with a
    random head, or one that foretells what it sees.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    rule = "must be a causal language model"
    text = config.get_text_config(decoder=True)
    trained_as = [name for name in getattr(config, "architectures", None) or [] if isinstance(name, str)]
    generative = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values(),
    }
    both_ways = (
        config.model_type in PERMUTED
        or (config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not _flag(config, "is_decoder"))
        or _flag(text, "use_bidirectional_attention")
    )
    if _flag(config, "is_encoder_decoder"):
        yield f"{rule} (a {config.model_type} is an encoder with a decoder)"
    elif both_ways:
        yield f"{rule} (this {config.model_type} attends to the tokens that it should foretell)"
    elif trained_as and all(hasattr(transformers, name) and name not in generative for name in trained_as):
        # A class that transformers does not know may be any; code that comes with the model tells of itself.
        yield f"{rule} (its config.json says {', '.join(trained_as)})"


def other_quantisation(config: Any) -> Iterator[str]:
    """Why the weights of ``config`` cannot be turned into NF4: transformers lets a model's own quantisation stand, or
    refuses to load it.
    """
    own = own_quantisation(config)
    if own is None:
        return
    method = own.get("quant_method") or "an unnamed one"
    method = getattr(method, "value", method)
    if own.get("load_in_4bit") and own.get("bnb_4bit_quant_type") == "nf4":
        return
    if own.get("load_in_4bit"):
        method = f"bitsandbytes, 4 bits, {own.get('bnb_4bit_quant_type', 'fp4')}"
    elif own.get("load_in_8bit"):
        method = "bitsandbytes, 8 bits"
    yield f"must have 16- or 32-bit weights, or bitsandbytes' NF4: its config.json tells of a quantisation ({method})"


def own_quantisation(config: Any) -> dict[str, Any] | None:
    """The quantisation that the model's weights are in already, where its config.json tells of one."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        own = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if own is None:
        return None
    if isinstance(own, dict):
        return own
    return own.to_dict() if hasattr(own, "to_dict") else {"quant_method": repr(own)}


def nf4_layers(model: Any) -> dict[str, tuple[int, int]]:
    """The layers of ``model`` that loading it will turn into NF4: path -> (output features, input features).

    Those are linear layers of torch's own class and transformers' Conv1D (the linear layer of GPT-2, its weight
    transposed), but for the output head and what the architecture keeps in 32 bits.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = (own_quantisation(model.config) or {}).get("llm_int8_skip_modules")
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, getattr(model, "_keep_in_fp32_modules", None))
    layers: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if not should_convert_module(name, kept):
            continue
        if type(module) is nn.Linear:
            layers[name] = module.out_features, module.in_features
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            layers[name] = outputs, inputs
    return layers


def build_on_meta(source: Source, *, for_nf4: bool = True) -> Any:
    """The transformers model of ``source`` on the meta device.

    ``for_nf4``: also refuse a quantisation of its own that is not NF4.

    Raises:
        InputError: it cannot be found or built, or is no causal language model; the field is ``base.model``.
    """
    return build(source, for_nf4=for_nf4)[0]


def linear_sites(source: Source) -> dict[str, tuple[int, int]]:
    """The linear layers of ``source`` that an adapter can change: path -> (output features, input features).

    Raises:
        InputError: as ``build_on_meta``, whatever its own quantisation.
    """
    return build(source, for_nf4=False)[1]


def build(source: Source, *, for_nf4: bool = True) -> tuple[Any, dict[str, tuple[int, int]]]:
    """``build_on_meta``, and the layers that NF4 can hold (``nf4_layers``).

    Raises:
        InputError: as ``build_on_meta``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if is_local(source.model) and not (Path(source.model) / "config.json").is_file():
        rule = "must be a model's folder, with a config.json, or a hub id"
        raise InputError([Fault("base.model", rule, source.model)])
    config = _load_config(source)
    faults = [Fault("base.model", rule, source.model) for rule in other_task(config)]
    if for_nf4:
        faults += [Fault("base.model", rule, source.model) for rule in other_quantisation(config)]
    if faults:
        raise InputError(faults)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty layers: a fault says so
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
        return model, nf4_layers(model)
    except Exception as error:  # noqa: BLE001 - numbers that do not go together can fail anywhere in an architecture
        rule = f"must be a model that can be built as its config.json says ({reason(error)})"
        raise InputError([Fault("base.model", rule, source.model)]) from None


def weights_identity(source: Source) -> object:
    """What the weights of ``source`` are known by: names, sizes and times of a folder's files, or a hub id's commit.

    It can be written as JSON, and is None or empty where nothing is known.
    """
    from transformers import AutoConfig

    if not is_local(source.model):
        config = AutoConfig.from_pretrained(
            source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        return getattr(config, "_commit_hash", None)
    kinds = (".json", ".safetensors", ".bin")
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(Path(source.model).iterdir())
        if path.suffix in kinds
    ]


def _load_config(source: Source) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - a config.json can make a configuration class raise anything
        _demand_trust(source, wanted="trust_remote_code" in str(error))
        known = isinstance(error, (OSError, ValueError))
        rule = "must be a model folder or hub id" if known else "must have a config.json that transformers can read"
        raise InputError([Fault("base.model", f"{rule} ({reason(error)})", source.model)]) from None
    if not is_causal_class(config):
        rule = f"must be a causal language model (transformers has none of the type {config.model_type})"
        raise InputError([Fault("base.model", rule, source.model)])
    _demand_trust(source, wanted=brings_code(config) and not has_class(config))
    return config


def _demand_trust(source: Source, *, wanted: bool) -> None:
    """Say so where nothing but the model's own code is missing."""
    if wanted and not source.trust_remote_code:
        rule = "must be true for this base, which is Python code of its own: read it before you run it"
        raise InputError([Fault("base.trust_remote_code", rule, source.trust_remote_code)])


def _flag(config: Any, name: str) -> bool:
    return getattr(config, name, None) is True
