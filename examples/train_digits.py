"""Train the two bundled models on a CPU: `python examples/train_digits.py` (two processes of one thread each).

Deterministic for a given torch version and processor family. Writes models/checkpoints/<model>.safetensors and prints
the mIoU on the held-out samples, with attention and with attention switched off.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model_card import mean_iou
from torch import nn

from edgeattn.models import MODELS, ModelSpec, digits
from edgeattn.models.checkpoint import save_checkpoint
from edgeattn.models.digits import material, pair_sample, segmentation_sample

RECIPES = {"ccnet-digits": (2000, 16), "cosnet-digits": (2500, 8)}
"""Steps and samples per step."""

CHECKPOINTS = Path(__file__).parent.parent / "models" / "checkpoints"


class TrainingSet(torch.utils.data.Dataset):
    """Endless composed samples; sample `index` depends on the index alone, whatever process makes it."""

    def __init__(self, spec: ModelSpec, count: int) -> None:
        self.spec = spec
        self.count = count
        self.compose = pair_sample if len(spec.inputs) == 2 else segmentation_sample

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[list[np.ndarray], np.ndarray]:
        sample = self.compose(material("train"), np.random.default_rng((11, index)))
        return [self.spec.preprocessing(image)[0] for image in sample.images], sample.target


def ccnet_loss(model: nn.Module, images: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of both heads at half resolution, background down-weighted, plus the soft overlap loss."""
    target = target[:, 0, ::2, ::2]
    weight = torch.ones(len(digits.CLASSES))
    weight[0] = 0.5
    loss = torch.zeros(())
    for output, factor in zip(model(*images), (1.0, 0.4), strict=True):
        logits = F.interpolate(output, size=(digits.HEIGHT, digits.WIDTH), mode="bilinear", align_corners=True)
        logits = logits[..., ::2, ::2]
        loss = loss + factor * F.cross_entropy(logits, target, weight)
        if factor == 1.0:
            ink = 1 - logits.softmax(dim=1)[:, 0]
            loss = loss + overlap_loss(ink, (target > 0).float())
    return loss


def cosnet_loss(model: nn.Module, images: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy and soft overlap loss of both masks."""
    mask_target, mask_reference, _ = model(*images)
    masks, truth = torch.cat([mask_target, mask_reference], dim=1)[..., ::2, ::2], target[..., ::2, ::2].float()
    return F.binary_cross_entropy(masks.clamp(1e-6, 1 - 1e-6), truth) * 3 + overlap_loss(masks, truth)


def overlap_loss(probability: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """One minus the Dice coefficient over the batch."""
    return 1 - (2 * (probability * truth).sum() + 1) / (probability.sum() + truth.sum() + 1)


def train(spec: ModelSpec, steps: int, batch: int, learning_rate: float) -> nn.Module:
    """Train from scratch and return the model in evaluation mode."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    model = spec.build().train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if hasattr(model, "head"):
        nn.init.ones_(model.head.cca.gamma)
    if hasattr(model, "linear_e"):
        nn.init.eye_(model.linear_e.weight)
    loss_of = cosnet_loss if len(spec.inputs) == 2 else ccnet_loss
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.15)
    loader = torch.utils.data.DataLoader(TrainingSet(spec, steps * batch), batch_size=batch)
    start = time.monotonic()
    for step, (images, target) in enumerate(loader, start=1):
        loss = loss_of(model, images, target)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == 10:
            seconds = time.monotonic() - start
            print(f"{spec.name} step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
        if step % 500 == 0:
            model.eval()
            scores = [mean_iou(spec, model, 40, ablate=ablate) for ablate in (False, True)]
            print(f"{spec.name} mIoU on 40 held-out samples: {scores[0]:.3f}, ablated {scores[1]:.3f}", flush=True)
            model.train()
    return model.eval()


def make(name: str, learning_rate: float, output: Path) -> None:
    """Train one model, write its checkpoint and print its figures."""
    spec = MODELS.get(name)
    model = train(spec, *RECIPES[name], learning_rate)
    path = save_checkpoint(model, output / f"{name}.safetensors", {"model": name, "recipe": "examples/train_digits.py"})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    print(f"{name} mIoU on 200 held-out samples: {mean_iou(spec, model, 200):.4f}")
    print(f"{name} with attention ablated:       {mean_iou(spec, model, 200, ablate=True):.4f}", flush=True)


def main() -> None:
    """Train the models named on the command line, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(RECIPES), help=f"of {', '.join(RECIPES)}; both by default")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--output", type=Path, default=CHECKPOINTS)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=make, args=(name, arguments.learning_rate, arguments.output))
        for name in arguments.models
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    if any(job.exitcode for job in jobs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
