"""What a drafter borrows from its target: the embedding of tokens, and the head that reads tokens off features."""

import weakref
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel


class _Rows(NamedTuple):
    tensors: list[torch.Tensor]  # of the head: kept, so that their ids stay theirs
    made_of: list[tuple[int, int]]  # ids and versions, which count changes in place
    columns: torch.Tensor
    rows: nn.Linear


_ROWS: weakref.WeakKeyDictionary[nn.Module, _Rows] = weakref.WeakKeyDictionary()  # of each target's head


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
            self.rows = rows_of(self.head, columns.to(weight.device))

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


@torch.inference_mode(False)  # training may meet what a call of `generate` has made
@torch.no_grad()
def rows_of(head: nn.Linear, columns: torch.Tensor) -> nn.Linear:
    """The rows ``columns`` (D,) of a head, side by side, so that a draft reads no others; the last ones are kept."""
    tensors = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
    made_of = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    known = _ROWS.get(head)
    if known is not None and known.made_of == made_of and torch.equal(known.columns, columns):
        return known.rows
    with torch.device("meta"):
        rows = nn.Linear(head.in_features, len(columns), head.bias is not None, dtype=head.weight.dtype)
    rows.weight = nn.Parameter(head.weight[columns], requires_grad=False)
    if head.bias is not None:
        rows.bias = nn.Parameter(head.bias[columns], requires_grad=False)
    _ROWS[head] = _Rows(tensors, made_of, columns, rows)
    return rows
