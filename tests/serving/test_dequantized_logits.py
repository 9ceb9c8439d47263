"""An adapter that was trained here, served by a real vLLM on the plain and on the dequantised base: the trainer's own
logits are the measure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.weights.architecture import ModelSource
from serving.weights.dequantize import dequantized_base
from tests.tuning.make import sweep_spec, write_rows
from tuning.engine.base import Base
from tuning.engine.data import prepare
from tuning.engine.pack import Pack
from tuning.engine.trainer import Trainer
from tuning.inspect import load_tokenizer
from tuning.spec import TrialConfig

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
IDS = torch.arange(5, 69).view(2, 32)
LENGTHS = range(4, 33, 4)
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

prompts, adapter, models = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
tables = []
for model in models:
    engine = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=64, max_logprobs=-1, max_num_seqs=16,
        enable_lora=True, max_loras=1, max_lora_rank=8, worker_extension_cls="serving.weights.cpu_lora.PlainBaseRows",
    )
    vocabulary = engine.model_config.get_vocab_size()
    answers = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0, logprobs=-1),
        lora_request=LoRARequest("trained", 1, adapter),
        use_tqdm=False,
    )
    places = [answer.outputs[0].logprobs[0] for answer in answers]
    tables.append([[place[token].logprob for token in range(vocabulary)] for place in places])
    del engine
    cleanup_dist_env_and_memory()
print(json.dumps(tables))
"""


def served_logprobs(adapter: Path, *models: Path) -> list[Tensor]:
    """What vLLM gives on each base for the token after the first ``LENGTHS`` of each row of ``IDS``: (b, lengths, v).

    Not as log-probabilities of a prompt: with an adapter those end vLLM 0.29 on CPUs.
    """
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_COMPILE_DISABLE": "1",
    }
    prompts = [row[:length].tolist() for row in IDS for length in LENGTHS]
    command = [sys.executable, "-c", ENGINE, json.dumps(prompts), str(adapter), *map(str, models)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr.partition("nanobind: leaked")[0][-3000:]
    return list(torch.tensor(json.loads(done.stdout.splitlines()[-1])).unflatten(1, (len(IDS), len(LENGTHS))))


def test_adapters_meet_the_weights_that_they_were_trained_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = sweep_spec(base, write_rows(tmp_path / "rows.jsonl"))
    train, evaluation, _ = prepare(spec.data, load_tokenizer(spec.base), tmp_path / "data", 0)
    trainer = Trainer(Base(spec.base), train, evaluation)
    slot = trainer.attach(TrialConfig(rank=8, alpha=16.0, learning_rate=1e-2, batch_size=4, steps=8))
    for _ in range(8):
        trainer.step([slot])
    trainer.save(slot, tmp_path / "checkpoint", spec.base.model, None)
    pack = Pack({slot: trainer.slots[slot]}, {slot: len(IDS)}, IDS.shape[1], trainer.base.dtype)
    pack.place([IDS.numel()])
    trainer.base.set_stacks(pack.prepare())
    with torch.no_grad():
        expected = (
            trainer.base.head(trainer.base.features(IDS)).float().log_softmax(-1)[:, [length - 1 for length in LENGTHS]]
        )

    adapter = tmp_path / "checkpoint" / "adapter"
    folder = dequantized_base(ModelSource(str(base)), "float32")
    served = served_logprobs(adapter, base, folder)
    distances = {
        name: float((found - expected).abs().max())
        for name, found in zip(("plain", "dequantized"), served, strict=True)
    }
    print(f"largest difference of a log-probability from the trainer's: {distances}")  # noqa: T201 - with pytest -s: the two distances
    assert distances["dequantized"] < 1e-3  # float32 in another order of sums
    assert distances["dequantized"] < distances["plain"] / 10
