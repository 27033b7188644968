"""What a drafter borrows from its target: the embedding of tokens, and the head that reads tokens off features."""

import torch
from torch import nn
from transformers import PreTrainedModel


class TargetWords(nn.Module):
    """How a target embeds tokens and reads them off features.

    Args:
        target: the target.
        columns: (D,) ids of the draft vocabulary; None: the whole of the target's.
    """

    def __init__(self, target: PreTrainedModel, columns: torch.Tensor | None = None):
        super().__init__()
        self.embedding, self.head = target.get_input_embeddings(), target.get_output_embeddings()
        self.columns, self.rows = columns, None
        weight, plain = self.head.weight, type(self.head) is nn.Linear and type(self.head.weight) is nn.Parameter
        if columns is not None and plain and not weight.is_meta:
            self.columns = columns.to(weight.device)
            kind = {"bias": self.head.bias is not None, "device": weight.device, "dtype": weight.dtype}
            # side by side, so that a draft reads no others; not initialised, which would draw from the user's seed
            self.rows = nn.utils.skip_init(nn.Linear, weight.shape[1], len(columns), **kind).requires_grad_(False)
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the rows of the head again, which may have changed; into the same place, which graphs know."""
        if self.rows is not None and self.columns is not None:
            torch.index_select(self.head.weight, 0, self.columns, out=self.rows.weight)
            if self.rows.bias is not None:
                torch.index_select(self.head.bias, 0, self.columns, out=self.rows.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (..) -> embeddings (.., H)."""
        return self.embedding(ids)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features (.., H) -> logits (.., D)."""
        weight = self.head.weight
        if weight.device.type != "meta":  # where accelerate brings the weights, it brings the features, too
            features = features.to(weight.device)
        features = features.to(weight.dtype) if weight.is_floating_point() else features
        if self.rows is not None:
            return self.rows(features)
        logits = self.head(features)
        return logits if self.columns is None else logits.index_select(-1, self.columns.to(logits.device))
