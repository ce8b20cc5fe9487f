"""Two processes on the CPU (gloo): equal features, equal parameters, and the steps of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from srf_retrofit import SRFConfig
from srf_retrofit.surgery import retrofit
from srf_retrofit.testing import tiny_llama
from srf_retrofit.training.attention_transfer import AttentionTransferTrainer
from srf_retrofit.training.callbacks import ResampleFeaturesCallback
from srf_retrofit.training.distillation import DistillationTrainer
from srf_retrofit.training.teacher import training_only

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS, LENGTH = 3, 4, 12
KINDS = ("labels", "teacher", "attention")


class Rows(torch.utils.data.Dataset):
    """Rows of different lengths, so that the processes hold different numbers of tokens."""

    def __init__(self, vocab: int) -> None:
        self.ids = torch.randint(3, vocab, (STEPS * ROWS, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(LENGTH) < LENGTH - 2 * (index % 4)).long()
        labels = self.ids[index].masked_fill(mask == 0, -100)
        return {"input_ids": self.ids[index], "labels": labels, "attention_mask": mask}


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return retrofit(tiny_llama(), SRFConfig(num_features=8, window=4, sinks=1, retained=2))


def train(kind: str, directory: Path, rows_per_process: int) -> PreTrainedModel:
    model = make_model()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=rows_per_process,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=torch.distributed.get_rank() if torch.distributed.is_initialized() else 0,
    )
    callbacks = [ResampleFeaturesCallback("settle:0.5")]
    common: dict[str, Any] = {"train_dataset": Rows(model.config.vocab_size), "callbacks": callbacks}
    if kind == "labels":
        Trainer(model, arguments, **common).train()
        return model
    with training_only(model, "attention"):
        if kind == "attention":
            AttentionTransferTrainer(model, arguments, **common).train()
        else:
            mixed = {"temperature": 2.0, "cross_entropy_weight": 0.5, "chunk_size": 7}
            DistillationTrainer(model, arguments, **mixed, **common).train()
    return model


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run this file as a program, once, in two processes."""
    directory = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", str(Path(__file__)), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(results: Path, tmp_path: Path, kind: str) -> None:
    first, second = (torch.load(results / f"{kind}-{rank}.pt") for rank in range(2))
    before = make_model().state_dict()
    alone = train(kind, tmp_path, ROWS).state_dict()
    for name, t in first.items():
        assert torch.equal(t, second[name]), f"{name} differs between the processes"
        if "attn_fn" in name:
            assert torch.equal(t, alone[name])
        elif kind != "attention":  # whose loss is a ratio per batch, not a mean over tokens
            torch.testing.assert_close(t, alone[name], rtol=1e-4, atol=1e-6)
    moved = {name for name in first if not torch.equal(first[name], before[name])}
    assert any(name.endswith("attn_fn.projection") for name in moved)
    assert any(name.endswith("q_proj.weight") for name in moved)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in KINDS:
        trained = train(kind, Path(sys.argv[1]), ROWS // 2)
        assert torch.distributed.get_world_size() == 2
        torch.save(trained.state_dict(), Path(sys.argv[1]) / f"{kind}-{torch.distributed.get_rank()}.pt")
