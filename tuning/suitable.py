"""Which bases can be trained here: rules over a configuration and over a model without weights.

What transformers and bitsandbytes will do with a base is asked of their own functions where they have one, so that what
is foretold here is what is then loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import Any

from cluster.errors import ABSENT, Fault
from cluster.schema import is_local
from tuning.engine.base import may_use_row_attention
from tuning.spec import BaseSpec

WEIGHTS = "model.safetensors", "pytorch_model.bin"
WEIGHT_FILES = tuple(f"{name}{suffix}" for name in WEIGHTS for suffix in ("", ".index.json"))
"""Where transformers looks for weights, in its order."""
PERMUTED = frozenset({"xlnet"})
"""Causal language models by transformers' list whose attention sees the tokens to come unless a mask is given."""
CARRYING = frozenset({"conv", "linear_attention", "hybrid", "hybrid_sliding"})
"""transformers' names of layers with a convolution or a recurrent state along the row, alone or beside attention."""


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


def broken_by_config(config: Any) -> Iterator[str]:
    """Rules that a configuration breaks although transformers would build and load a causal language model from it."""
    yield from _other_task(config)
    yield from _other_quantisation(config)


def _other_task(config: Any) -> Iterator[str]:
    """A model whose weights are of another kind would get a random head, or be trained to foretell what it sees."""
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


def _other_quantisation(config: Any) -> Iterator[str]:
    """transformers lets a model's own quantisation stand, or refuses to load it."""
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


def mixed_layers(model: Any, layers: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    """Those of ``layers`` that ``model``, on the meta device, calls with anything but rows x tokens x features: there
    the rows of a pack could not be told apart. Found by a forward pass without numbers.

    The layers are replaced by stand-ins, so the model is of no use afterwards. What a model that cannot run without
    numbers does is not known.

    Raises:
        ValueError: the model does not call its layers, but looks at their weights.
    """
    import torch
    from torch import nn

    rows, tokens = 3, 8
    mixed: set[str] = set()

    class StandIn(nn.Module):
        """What a packed layer is to its base: something to call, without weights to be seen."""

        def __init__(self, name: str, outputs: int) -> None:
            super().__init__()
            self.name, self.outputs = name, outputs

        def forward(self, x: Any) -> Any:
            if x.shape[:-1] != (rows, tokens):
                mixed.add(self.name)
            return x.new_empty((*x.shape[:-1], self.outputs))

    for name, (outputs, _) in layers.items():
        model.set_submodule(name, StandIn(name, outputs))
    ids = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
    # Many build a mask by looking at numbers; a whole one is taken as it is, but not by all.
    for known in ({"attention_mask": torch.zeros((rows, 1, tokens, tokens), device="meta")}, dict[str, Any]()):
        try:
            with torch.no_grad():
                model.eval()(input_ids=ids, use_cache=False, **known)
            break
        except Exception as error:  # noqa: BLE001 - whatever needs numbers, or more than token ids
            if isinstance(error, AttributeError) and StandIn.__name__ in str(error):
                rule = "must call its linear layers, but it reads their weights itself: they could carry no adapter"
                raise ValueError(rule) from None
    return frozenset(mixed)


def end_to_end_obstacle(model: Any) -> str | None:
    """Why rows laid end to end in ``model``, on the meta device, would not give what they give apart; None where
    nothing is known against it, and the loaded base will tell (``Base.can_lie_end_to_end``).
    """
    import torch

    from tuning.engine import attention

    kind = model.config.model_type
    if not may_use_row_attention(model):
        return f"{kind} computes its attention itself, over the whole batch"
    layers: list[str] | None = getattr(model.config.get_text_config(), "layer_types", None)
    carrying = sorted(CARRYING.intersection(layers or ()))
    # A class that knows of a state has one in each layer, if its configuration does not tell the layers apart.
    if carrying or (not layers and getattr(model, "_is_stateful", False)):
        what = f"layers of the kind {', '.join(carrying)}" if carrying else "a recurrent state"
        return f"{kind} has {what}, which would carry one row into the next"
    taken = inspect.signature(model.base_model.forward).parameters.values()
    if not any(one.name == "position_ids" or one.kind is one.VAR_KEYWORD for one in taken):
        return f"{kind} cannot be told the positions of its tokens"
    before = model.config._attn_implementation  # noqa: SLF001 - there is no other way to ask
    ids = torch.zeros((1, 8), dtype=torch.long, device="meta")
    model.set_attn_implementation(_probe().name)
    try:
        with torch.no_grad():
            model.eval().base_model(input_ids=ids, use_cache=False)
    except attention.OtherAttentionError as error:
        return str(error)
    except Exception as error:
        # The architecture's own, which looks at numbers or wants more than token ids, leaves it unknown.
        if any(frame.f_code.co_filename == attention.__file__ for frame, _ in walk_tb(error.__traceback__)):
            raise
        return None
    finally:
        model.set_attn_implementation(before)
    return None


@cache
def _probe() -> Any:
    """One for all models: transformers keeps each attention function that it is told of."""
    from tuning.engine.attention import RowAttention

    return RowAttention()


def weight_faults(spec: BaseSpec) -> list[Fault]:
    """What is wrong with the weights' files of a base in a local folder: absent, or cut short.

    Only their headers are read. Weights of a hub id are not looked for: they may still have to be fetched.
    """
    folder = Path(spec.model)
    if not is_local(spec.model) or not folder.is_dir():
        return []
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        return [Fault("base.model", f"must hold weights, such as {WEIGHTS[0]}", spec.model)]
    if found.suffix != ".json":
        return _file_faults([found])
    try:
        return _file_faults([folder / shard for shard in _shards(found)])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [Fault(str(found), f"must be an index of weights ({reason(error)})", ABSENT)]


def _shards(index: Path) -> list[str]:
    import json

    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _file_faults(files: list[Path]) -> list[Fault]:
    from safetensors import SafetensorError, safe_open

    faults: list[Fault] = []
    for file in files:
        if not file.is_file():
            faults.append(Fault(str(file), "no such file, but the index of weights names it", ABSENT))
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                faults.append(Fault(str(file), f"must be whole safetensors ({reason(error)})", ABSENT))
    return faults


def _flag(config: Any, name: str) -> bool:
    return getattr(config, name, None) is True
