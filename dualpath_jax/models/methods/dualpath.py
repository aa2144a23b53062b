"""DualPath (CVPR 2023, sec. 4): one frozen image transformer, adapted in two paths.

Public: `DualPath`, `sincos3d`.
"""

import functools
import math
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.models.backbones.layers import BlockHooks, use_cpu_kernels
from dualpath_jax.models.backbones.registry import BackboneConfig, build_backbone
from dualpath_jax.models.backbones.vit import resize_positions
from dualpath_jax.models.methods.adapters import (
    Adapter,
    MlpClassifier,
    ParallelAdapterHooks,
    SerialAdapterHooks,
)

TEMPORAL_POSITIONS = ("sincos3d", "sincos3d+clip", "clip", "learned")


def _axis_pieces(size: int, cell: int, patch: int) -> list[list[tuple[int, float, float]]]:
    """For each patch along an axis of a frameset: its pieces (cell, place in the cell, share).

    A piece is the part of a patch that lies in one cell. Its place is its centre, in patches, 0 for
    the first patch of the cell; its share is its part of the patch's pixels.
    """
    tokens = []
    for start in range(0, size, patch):
        pieces = []
        for index in range(start // cell, (start + patch - 1) // cell + 1):
            low = max(start, index * cell) - index * cell
            high = min(start + patch, (index + 1) * cell) - index * cell
            pieces.append((index, (low + high) / 2 / patch - 0.5, (high - low) / patch))
        tokens.append(pieces)
    return tokens


def _encode_axis(place: float, channels: int) -> np.ndarray:
    """Sines, then cosines, of one coordinate: [2 * channels] (base 10000)."""
    angles = place / 10000.0 ** (np.arange(channels) / channels)
    return np.concatenate([np.sin(angles), np.cos(angles)])


@functools.lru_cache(maxsize=8)
def sincos3d(
    num_framesets: int, grid: tuple[int, int], frame_size: int, patch_size: int, width: int
) -> np.ndarray:
    """Fixed encoding of (time, row, column) for the patches of grid framesets (sec. 4.2, ref. 75).

    Each axis has 2 ceil(D/6) channels, sines then cosines; time, row, column are concatenated and
    cut to D. Time runs over all T frames, row and column are inside the frame, in patches. A patch
    that covers several frames takes the average over its pixels of the encodings, the pixels of one
    frame taken at their centre.

    Args:
      num_framesets: G.
      grid: (w, h), frames across and down a frameset.
      frame_size: side of a frame inside the frameset, pixels.
      patch_size: P.
      width: D.

    Returns:
      [G, N - 1, D] float32, patches row by row.
    """
    across, down = grid
    channels = math.ceil(width / 6)
    columns = _axis_pieces(across * frame_size, frame_size, patch_size)
    rows = _axis_pieces(down * frame_size, frame_size, patch_size)
    table = np.zeros((num_framesets, len(rows), len(columns), 6 * channels))
    for g, i, j in np.ndindex(table.shape[:3]):
        for cell_row, row, row_share in rows[i]:
            for cell_column, column, column_share in columns[j]:
                time = (g * down + cell_row) * across + cell_column
                code = [_encode_axis(place, channels) for place in (time, row, column)]
                table[g, i, j] += row_share * column_share * np.concatenate(code)
    return table.reshape(num_framesets, -1, 6 * channels)[..., :width].astype(np.float32)


class DualPath(nn.Module):
    """Spatial path on S frames, temporal path on G framesets, one classifier.

    Parameters: `backbone` (frozen), `spatial` and `temporal` (adapters stacked [L, ...], class
    token; the spatial path's position table), `classifier`. Class tokens and position tables are
    to be started at the backbone's by `start_from_backbone`. A Swin has neither of them: its counts
    in PAPER.md's table (10,014,766 and 8,341,043) are those of adapters and classifier alone.

    Attributes:
      config: the backbone's shape.
      num_classes: width of the output.
      grid: (w, h), frames across and down a frameset.
      frame_size: side of a frame inside a frameset, pixels.
      num_framesets: G.
      spatial_path, temporal_path: without a path, its half of the classifier's input is zero.
      adapter: the form of all adapters.
      serial_skip, pre_attention_adapter, pre_attention_residual: see `SerialAdapters`.
      temporal_position: "sincos3d" (paper), "sincos3d+clip" (CLIP's frozen table added), "clip"
        (that table alone), "learned" (trainable, one table per frameset, started at CLIP's).
      train_tokens: class tokens and spatial position table are trainable copies of CLIP's.
      adapt_shifted_windows: in Swin, adapters in the shifted-window blocks too; the paper has them
        in the window blocks only (App. B.1).
      dtype: compute dtype of the transformer; features and classifier are float32.
      scan_blocks, remat: see `ViT`.
      cls_token_only: where the backbone has a class token, compute no other token in its last block.
    """

    config: BackboneConfig
    num_classes: int
    grid: tuple[int, int] = (4, 4)
    frame_size: int = 56
    num_framesets: int = 1
    spatial_path: bool = True
    temporal_path: bool = True
    adapter: Adapter = Adapter(parent=None)
    serial_skip: bool = False
    pre_attention_adapter: bool = False
    pre_attention_residual: bool = True
    temporal_position: str = "sincos3d"
    train_tokens: bool = True
    adapt_shifted_windows: bool = False
    dtype: Any = jnp.float32
    scan_blocks: bool = False
    remat: str = "none"
    cls_token_only: bool = True

    def setup(self):
        if self.temporal_position not in TEMPORAL_POSITIONS:
            raise ValueError(
                f"unknown temporal_position {self.temporal_position!r}: known are "
                f"{', '.join(TEMPORAL_POSITIONS)}"
            )
        if not (self.spatial_path or self.temporal_path):
            raise ValueError("spatial_path and temporal_path are both False: nothing to train")
        if self.temporal_position != "sincos3d" and not self.config.has_class_token:
            raise ValueError(
                f"temporal_position {self.temporal_position!r} takes the backbone's position "
                f"table, and {self.config.name} has none: use 'sincos3d'"
            )
        self.backbone = build_backbone(self.config, self.dtype, self.scan_blocks, self.remat)
        for_cpu = use_cpu_kernels(self.scan_blocks)
        adapter = self.adapter.clone(for_cpu=for_cpu, dtype=self.dtype, parent=None)
        shifted = self.adapt_shifted_windows
        self.spatial_sites = ParallelAdapterHooks(adapter, shifted_windows=shifted, parent=None)
        self.temporal_sites = SerialAdapterHooks(
            adapter,
            serial_skip=self.serial_skip,
            pre_attention=self.pre_attention_adapter,
            pre_attention_residual=self.pre_attention_residual,
            shifted_windows=shifted,
            parent=None,
        )
        if self.spatial_path:
            self.spatial = self.param("spatial", self._init_spatial)
        if self.temporal_path:
            self.temporal = self.param("temporal", self._init_temporal)
        self.classifier = MlpClassifier(self.config.feature_dim, self.num_classes)

    def _init_spatial(self, rng: jax.Array) -> Any:
        tokens = self.config.num_tokens
        params = {"adapters": self.backbone.init_hooks(rng, self.spatial_sites, 1, tokens)}
        if self._trains_tokens:
            params["class_token"] = self.backbone.class_embedding
            params["position"] = self.backbone.position_embedding
        return params

    def _init_temporal(self, rng: jax.Array) -> Any:
        tokens = self.config.num_tokens
        params = {"adapters": self.backbone.init_hooks(rng, self.temporal_sites, 1, tokens)}
        if self._trains_tokens:
            params["class_token"] = self.backbone.class_embedding
        if self.temporal_position == "learned":
            table = resize_positions(self.backbone.position_embedding, self._frameset_patches())
            params["position"] = jnp.tile(table, (self.num_framesets, 1, 1))
        return params

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the paths that the model has."""
        present = {"spatial": self.spatial_path, "temporal": self.temporal_path}
        return tuple(name for name, there in present.items() if there)

    @property
    def _trains_tokens(self) -> bool:
        return self.train_tokens and self.config.has_class_token

    def _frameset_patches(self) -> tuple[int, int]:
        across, down = self.grid
        patch = self.config.patch_size
        return down * self.frame_size // patch, across * self.frame_size // patch

    def start_from_backbone(self, params: Any) -> Any:
        """`params` with class tokens and position tables set to those of `params["backbone"]`."""
        backbone = params["backbone"]
        if not self.config.has_class_token:
            return params
        params = {**params, **{k: dict(params[k]) for k in ("spatial", "temporal") if k in params}}
        for path in ("spatial", "temporal"):
            if "class_token" in params.get(path, {}):
                params[path]["class_token"] = jnp.array(backbone["class_embedding"], jnp.float32)
        table = jnp.array(backbone["position_embedding"], jnp.float32)
        if "position" in params.get("spatial", {}):
            params["spatial"]["position"] = table
        if "position" in params.get("temporal", {}):
            table = resize_positions(table, self._frameset_patches())
            params["temporal"]["position"] = jnp.tile(table, (self.num_framesets, 1, 1))
        return params

    def _temporal_positions(self) -> jax.Array:
        """p_TP [G, N, D]: patches by `temporal_position`, class token at CLIP's class position."""
        if self.temporal_position == "learned":
            return self.temporal["position"]
        fixed = sincos3d(
            self.num_framesets,
            tuple(self.grid),
            self.frame_size,
            self.config.patch_size,
            self.config.width,
        )
        if not self.config.has_class_token:
            return jnp.asarray(fixed)
        frozen = resize_positions(self.backbone.position_embedding, self._frameset_patches())
        frozen = jnp.tile(frozen, (self.num_framesets, 1, 1))
        if self.temporal_position == "clip":
            return frozen
        patches = frozen[:, 1:] if self.temporal_position == "sincos3d+clip" else 0.0
        return jnp.concatenate([frozen[:, :1], fixed + patches], axis=1)

    def spatial_features(
        self, frames: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """frames [B, S, H, W, 3], normalised -> y_SP [B, e] float32 (eq. 7, 8)."""
        return self._features(frames, self._path("spatial"), dropout_rng)

    def temporal_features(
        self, framesets: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """framesets [B, G, H', W', 3], normalised -> y_TP [B, e] float32 (eq. 9, 10)."""
        return self._features(framesets, self._path("temporal"), dropout_rng)

    def _path(self, name: str) -> tuple[BlockHooks, Any, jax.Array | None]:
        """Of the path "spatial" or "temporal": hooks, parameters, positions of a clip's images."""
        if name == "spatial":
            return self.spatial_sites, self.spatial, self.spatial.get("position")
        return self.temporal_sites, self.temporal, self._temporal_positions()

    def _embed(self, images: jax.Array, class_token: Any, position: Any) -> jax.Array:
        """Images of each clip [B, images, H, W, 3] -> tokens [(B images), N, D]."""
        if position is not None and position.ndim == 3:  # one for each image of a clip
            position = jnp.tile(position, (images.shape[0], 1, 1))
        images = einops.rearrange(images, "b i h w c -> (b i) h w c")
        return self.backbone.embed(images, class_token, position)

    def _features(self, images: jax.Array, path: Any, dropout_rng: Any) -> jax.Array:
        """One path over the images of each clip, averaged: [B, images, H, W, 3] -> [B, e]."""
        hooks, params, position = path
        h = self._embed(images, params.get("class_token"), position)
        h = self.backbone.encode(h, hooks, params["adapters"], dropout_rng, self.cls_token_only)
        features = self.backbone.pool(h).astype(jnp.float32)
        return einops.reduce(features, "(b i) e -> b e", "mean", b=images.shape[0])

    def attention(
        self,
        spatial: jax.Array | None,
        temporal: jax.Array | None,
        adapted: bool = True,
        all_blocks: bool = False,
    ) -> dict[str, jax.Array]:
        """What the tokens of each path attend to, averaged over heads (Fig. 4, A1).

        Args:
          spatial, temporal: as of `__call__`.
          adapted: with class token and adapters of the path; otherwise the frozen backbone (eq. 2)
            with its own class token, at the same positions.
          all_blocks: of every block, not only the last.

        Returns:
          "spatial" [L', B, S, N, N] and "temporal" [L', B, G, N, N], for the paths that there are:
          float32, class token first, rows (queries) sum to 1 over the last axis (keys); L' is L
          with `all_blocks`, else 1.
        """
        if not self.config.has_class_token:
            raise ValueError(
                f"{self.config.name} has no class token whose attention could be shown: this "
                "works with ViT backbones"
            )
        first = 0 if all_blocks else self.config.depth - 1
        inputs = {"spatial": spatial, "temporal": temporal}
        weights = {}
        for name in self.paths:
            hooks, params, position = self._path(name)
            h = self._embed(inputs[name], params.get("class_token") if adapted else None, position)
            fill = (hooks, params["adapters"]) if adapted else (None, None)
            rows = self.backbone.attention(h, *fill, first=first)
            weights[name] = rows.reshape(len(rows), *inputs[name].shape[:2], *rows.shape[2:])
        return weights

    def __call__(
        self, spatial: jax.Array, temporal: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Logits of a batch of clips; see `tuning.Method.build`.

        Args:
          spatial: [B, S, H, W, 3], normalised with CLIP's mean and std.
          temporal: [B, G, H', W', 3], likewise.
          dropout_rng: switches on adapter dropout (training).

        Returns:
          [B, classes] float32.
        """
        if temporal is None and self.temporal_path:
            raise ValueError("the temporal path needs framesets [B, G, H', W', 3], but got none")
        rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        nothing = jnp.zeros((spatial.shape[0], self.config.feature_dim), jnp.float32)
        y_sp = self.spatial_features(spatial, rngs[0]) if self.spatial_path else nothing
        y_tp = self.temporal_features(temporal, rngs[1]) if self.temporal_path else nothing
        return self.classifier(jnp.concatenate([y_sp, y_tp], axis=-1))
