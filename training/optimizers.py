"""The optimizers of a drafter: AdamW, or Muon for the matrices of its layers with AdamW for the rest."""

from typing import Any

import torch

from ppow import PPOWDrafter

from .config import StageConfig

BETAS = (0.9, 0.95)  # AdamW's averaging factors (ours)


class Optimizers:
    """Several optimizers that step and save as one; parameters are numbered through."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Parameter -> what its optimizer remembers of it, to be changed in place."""
        return {parameter: entries for part in self.parts for parameter, entries in part.state.items()}

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every optimizer."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As one optimizer over all parameters in the parts' order."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        start = 0
        for part in self.parts:
            content = part.state_dict()
            state |= {start + index: entries for index, entries in content["state"].items()}
            own = [{**group, "params": [start + i for i in group["params"]]} for group in content["param_groups"]]
            groups += own
            start += sum(len(group["params"]) for group in own)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        groups = iter(content["param_groups"])
        for part in self.parts:  # which take parameters by their order, whatever the numbers
            own = [next(groups) for _ in part.param_groups]
            numbers = {index for group in own for index in group["params"]}
            state = {index: entries for index, entries in content["state"].items() if index in numbers}
            part.load_state_dict({"state": state, "param_groups": own})


def make_optimizer(config: StageConfig, drafter: PPOWDrafter) -> torch.optim.Optimizer | Optimizers:
    """Over the parameters with ``requires_grad``, without weight decay.

    Muon (Jordan et al., 2024; torch.optim.Muon) takes the matrices of the layers and of the taps' fusion, its steps as
    long as AdamW's (arXiv 2502.16982), so that one learning rate serves both; AdamW the embedding, the head and the
    norms.

    Raises:
        ValueError: for Muon with a torch that has none.
    """
    trained = [(name, p) for name, p in drafter.named_parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        weights = [p for _, p in trained]
        return torch.optim.AdamW(weights, lr=config.learning_rate, betas=BETAS, weight_decay=0.0)
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no torch.optim.Muon; use --optimizer adamw or torch >= 2.9.")
    inside = {name for name, p in trained if p.ndim == 2 and name.startswith(("layers.", "fc."))}
    return Optimizers(
        torch.optim.Muon(
            [p for name, p in trained if name in inside],
            lr=config.learning_rate,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [p for name, p in trained if name not in inside], lr=config.learning_rate, betas=BETAS, weight_decay=0.0
        ),
    )
