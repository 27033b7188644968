"""Window attention beside dense attention on random input, for tests on a CPU, in Triton's interpreter and on a GPU."""

import torch

from ppow.attention_ppow import attend_window, pack_window
from ppow.masks_ppow import ancestors_of, window_allowed

# batch, heads, key-value heads, nodes, head size, slots, kept tokens of each row
SHAPES = [(1, 4, 2, 3, 8, 64, [20]), (2, 8, 8, 1, 48, 128, [0, 77]), (1, 4, 1, 61, 64, 300, [200])]


def attention_cases(shape, device, dtype):
    """Window attention on random input, and scaled dot product attention under the dense mask."""
    batch, heads, kv_heads, nodes, size, slots, kept = shape
    query = torch.randn(batch, heads, nodes, size, device=device, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, slots, size, device=device, dtype=dtype)
    parents = (torch.rand(batch, nodes, device=device) * torch.arange(nodes, device=device)).long()
    seen = ancestors_of(parents, nodes)
    base = torch.tensor(kept, device=device)
    first = (torch.rand(batch, nodes, device=device) * base[:, None]).long()
    window = base[:, None] + torch.arange(nodes, device=device)
    allowed = window_allowed(base[:, None].expand(-1, nodes), seen, None, window, slots)
    allowed &= torch.arange(slots, device=device) >= first[:, None, :, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
    return attend_window(query, key, value, pack_window(base, seen, first), size**-0.5), expected.transpose(1, 2)
