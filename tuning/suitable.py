"""Which bases can be trained here: rules over a model without weights, and over the files of its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import Any

from cluster.errors import ABSENT, Fault
from cluster.schema import is_local
from serving.weights.architecture import reason
from tuning.engine.base import may_use_row_attention
from tuning.spec import BaseSpec

WEIGHTS = "model.safetensors", "pytorch_model.bin"
WEIGHT_FILES = tuple(f"{name}{suffix}" for name in WEIGHTS for suffix in ("", ".index.json"))
"""Where transformers looks for weights, in its order."""
CARRYING = frozenset({"conv", "linear_attention", "hybrid", "hybrid_sliding"})
"""transformers' names of layers with a convolution or a recurrent state along the row, alone or beside attention."""


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
