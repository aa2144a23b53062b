"""Defines DualPath in PyTorch, as a user of PyTorch would write it, for comparisons of speed.

It follows the equations of sec. 4 for CLIP backbones with the defaults of
dualpath_jax/config/schema.py and, if the parameters contain it, SSv2's adapter before attention.
Every layer is torch's own; attention is `scaled_dot_product_attention`. Torch is needed only for
the benchmarks: pip install ".[bench]".

Axes: B batch, S frames, G framesets, M images, N tokens, D width, K heads.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def _linear(arrays: Mapping[str, np.ndarray], name: str) -> nn.Linear:
    """Make a linear layer from the arrays below `name`."""
    kernel, bias = arrays[f"{name}/kernel"], arrays[f"{name}/bias"]
    layer = nn.Linear(*kernel.shape)
    layer.weight.data = torch.tensor(kernel.T.copy())
    layer.bias.data = torch.tensor(bias)
    return layer


def _layer_norm(arrays: Mapping[str, np.ndarray], name: str, eps: float) -> nn.LayerNorm:
    """Make a LayerNorm from the arrays below `name`."""
    layer = nn.LayerNorm(arrays[f"{name}/scale"].shape[0], eps=eps)
    layer.weight.data = torch.tensor(arrays[f"{name}/scale"])
    layer.bias.data = torch.tensor(arrays[f"{name}/bias"])
    return layer


def _block_arrays(
    arrays: Mapping[str, np.ndarray], prefix: str, index: int
) -> dict[str, np.ndarray]:
    """Return the arrays of block `index` from the stacked arrays below `prefix`."""
    return {k[len(prefix) :]: v[index] for k, v in arrays.items() if k.startswith(prefix)}


class Adapter(nn.Module):
    """Applies W_up GELU(W_down x)."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str):
        super().__init__()
        self.down, self.up = _linear(arrays, f"{name}/down"), _linear(arrays, f"{name}/up")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(functional.gelu(self.down(x)))


class Block(nn.Module):
    """Applies a frozen block with the adapters of a path: eq. 7 (spatial) or eq. 9 (temporal)."""

    def __init__(self, arrays: Mapping[str, np.ndarray], heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = (_layer_norm(arrays, name, eps) for name in ("ln_1", "ln_2"))
        self.qkv, self.out = (_linear(arrays, f"attention/{name}") for name in ("qkv", "out"))
        self.hidden, self.output = (_linear(arrays, f"mlp/{name}") for name in ("hidden", "output"))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Apply self-attention to x [M, N, D]; the shape stays."""
        m, n, d = x.shape
        qkv = self.qkv(x).view(m, n, 3, self.heads, d // self.heads)
        y = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.out(y.transpose(1, 2).reshape(m, n, d))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the MLP with CLIP's QuickGELU to x [M, N, D]."""
        x = self.hidden(x)
        return self.output(x * torch.sigmoid(1.702 * x))

    def spatial(self, h: torch.Tensor, adapters: nn.ModuleDict) -> torch.Tensor:
        """Apply eq. 7 to h [M, N, D]."""
        x = self.ln_1(h)
        z = h + self.attention(x) + adapters["attention"](x)
        x = self.ln_2(z)
        return z + self.mlp(x) + adapters["mlp"](x)

    def temporal(self, h: torch.Tensor, adapters: nn.ModuleDict) -> torch.Tensor:
        """Apply eq. 9 to h [M, N, D]."""
        x = self.ln_1(h)
        if "before" in adapters:
            x = x + adapters["before"](x)
        z = h + adapters["attention"](self.attention(x))
        return z + adapters["mlp"](self.mlp(self.ln_2(z)))


class TorchDualPath(nn.Module):
    """Runs the two paths over one frozen CLIP ViT, then the classifier.

    Args:
      arrays: parameters of `methods.dualpath.DualPath` by path, float32.
      temporal_position: p_TP [G, N, D] float32.
      heads: K.
      eps: epsilon of the LayerNorms.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        temporal_position: np.ndarray,
        heads: int,
        eps: float = 1e-5,
    ):
        super().__init__()
        depth = arrays["backbone/blocks/ln_1/scale"].shape[0]
        patch = arrays["backbone/patch_embedding/kernel"]
        self.patch = nn.Conv2d(3, patch.shape[-1], patch.shape[:2], patch.shape[:2], bias=False)
        self.patch.weight.data = torch.tensor(patch.transpose(3, 2, 0, 1).copy())
        names = ("ln_pre", "ln_post")
        self.ln_pre, self.ln_post = (_layer_norm(arrays, f"backbone/{n}", eps) for n in names)
        blocks = [_block_arrays(arrays, "backbone/blocks/", i) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(block, heads, eps) for block in blocks)
        self.projection = nn.Parameter(torch.tensor(arrays["backbone/projection"]))
        self.requires_grad_(False)
        self.register_buffer("temporal_position", torch.tensor(temporal_position))
        self.position = nn.Parameter(torch.tensor(arrays["spatial/position"]))
        self.class_tokens, self.adapters = nn.ParameterDict(), nn.ModuleDict()
        for path in ("spatial", "temporal"):
            self.class_tokens[path] = nn.Parameter(torch.tensor(arrays[f"{path}/class_token"]))
            adapters = [_block_arrays(arrays, f"{path}/adapters/", i) for i in range(depth)]
            hooks = sorted({name.split("/")[0] for name in adapters[0]})
            self.adapters[path] = nn.ModuleList(
                nn.ModuleDict({hook: Adapter(block, hook) for hook in hooks}) for block in adapters
            )
        self.classifier = nn.Sequential(
            _linear(arrays, "classifier/hidden"), nn.GELU(), _linear(arrays, "classifier/output")
        )

    def _features(self, images: torch.Tensor, path: str) -> torch.Tensor:
        """Map the images of each clip [B, images, 3, H, W] to features of a path [B, e]."""
        batch, count = images.shape[:2]
        patches = self.patch(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        token = self.class_tokens[path].expand(len(patches), 1, -1).to(patches.dtype)
        position = self.position
        if path == "temporal":
            position = self.temporal_position.repeat(batch, 1, 1)
        h = self.ln_pre(torch.cat([token, patches], 1) + position.to(patches.dtype))
        for block, adapters in zip(self.blocks, self.adapters[path], strict=True):
            h = getattr(block, path)(h, adapters)
        features = (self.ln_post(h[:, 0]) @ self.projection.to(h.dtype)).float()
        return features.view(batch, count, -1).mean(1)

    def forward(self, spatial: torch.Tensor, temporal: torch.Tensor) -> torch.Tensor:
        """Map normalized [B, S, 3, H, W] and [B, G, 3, H', W'] to logits [B, classes]."""
        y = [self._features(spatial, "spatial"), self._features(temporal, "temporal")]
        return self.classifier(torch.cat(y, -1))
