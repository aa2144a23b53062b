"""Defines DualPath (CVPR 2023, sec. 4): one frozen image transformer, adapted in two paths.

Axes: B batch, S frames, G framesets, N tokens (class token first), D width, L blocks, e width of
the features of a path.
"""

import functools
import math
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.models.backbones.contract import BackboneConfig
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.backbones.registry import build_backbone
from dualpath_jax.models.methods.adapters import (
    Adapter,
    FramesetLayout,
    MlpClassifier,
    OrderedReadout,
    ParallelAdapterHooks,
    SerialAdapterHooks,
)

TEMPORAL_POSITIONS = ("sincos3d", "sincos3d+clip", "clip", "learned")


def _split_patches_by_cell(
    size: int, cell: int, patch: int
) -> list[list[tuple[int, float, float]]]:
    """Split the patches along one axis of a frameset at the borders of its cells (frames).

    Args:
      size: length of the axis, pixels.
      cell: length of a frame inside the frameset, pixels.
      patch: length of a patch, pixels.

    Returns:
      For each patch its pieces (index of the cell, place, share). The place is the center of the
      piece inside the cell, in patches, 0 at the center of the cell's first patch. The share is the
      fraction of the patch's pixels.
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
    """Return sines, then cosines, of one coordinate: [2 * channels] (base 10000)."""
    angles = place / 10000.0 ** (np.arange(channels) / channels)
    return np.concatenate([np.sin(angles), np.cos(angles)])


@functools.lru_cache(maxsize=8)
def sincos3d(
    num_framesets: int, grid: tuple[int, int], frame_size: int, patch_size: int, width: int
) -> np.ndarray:
    """Encode (time, row, column) of the patches of framesets (sec. 4.2, ref. 75).

    Each axis has 2 ceil(D/6) channels, sines then cosines; time, row and column are concatenated
    and cut to D channels. Time counts all T frames; row and column count patches inside the frame.
    A patch that covers several frames gets the average of the frames' encodings, weighted by their
    pixels in the patch; each frame is encoded at the center of its pixels.

    Args:
      num_framesets: G.
      grid: (w, h), frames across and down a frameset.
      frame_size: side of a frame inside the frameset, pixels.
      patch_size: P, pixels.
      width: D.

    Returns:
      [G, N - 1, D] float32, patches row by row.
    """
    across, down = grid
    channels = math.ceil(width / 6)
    columns = _split_patches_by_cell(across * frame_size, frame_size, patch_size)
    rows = _split_patches_by_cell(down * frame_size, frame_size, patch_size)
    table = np.zeros((num_framesets, len(rows), len(columns), 6 * channels))
    for g, i, j in np.ndindex(table.shape[:3]):
        for cell_row, row, row_share in rows[i]:
            for cell_column, column, column_share in columns[j]:
                time = (g * down + cell_row) * across + cell_column
                code = [_encode_axis(place, channels) for place in (time, row, column)]
                table[g, i, j] += row_share * column_share * np.concatenate(code)
    return table.reshape(num_framesets, -1, 6 * channels)[..., :width].astype(np.float32)


class DualPath(nn.Module):
    """Runs a spatial path on S frames and a temporal path on G framesets, then one classifier.

    Parameters: `backbone` (frozen), `spatial` and `temporal` (adapters stacked [L, ...] and class
    token; `spatial` also a position table), `classifier`, and `readout` with `readout_width`. Class
    tokens and position tables must start at the backbone's values, see `start_from_backbone`. A
    Swin has neither class token nor position table: only adapters and classifier train.
    SigLIP has no class token.

    Attributes:
      config: the backbone's shape.
      num_classes: width of the output.
      grid: (w, h), frames across and down a frameset.
      frame_size: side of a frame inside a frameset, pixels.
      num_framesets: G.
      spatial_path, temporal_path: use the path; the half of the classifier's input that belongs to
        an unused path is zero.
      adapter: template of all adapters.
      serial_skip, pre_attention_adapter, pre_attention_residual: see `SerialAdapterHooks`.
      temporal_position: "sincos3d" (paper), "sincos3d+clip" (CLIP's frozen table added), "clip"
        (only that table), "learned" (trainable, one table per frameset, started at CLIP's).
      spatial_dropout: probability that training drops the spatial features of a clip, so that the
        temporal path must learn its class without them.
      time_kernel_size: frames that a depthwise convolution in the adapters of the temporal path
        covers, see `Adapter`; 0 for none (paper). Patches must not cover several frames.
      readout_width: the temporal path's features are made of all patch tokens in order, see
        `OrderedReadout`, with so many channels each; 0 reads the class token (paper).
      readout_frame_width: features of each frame that this readout makes first, or 0 for none.
      train_tokens: train copies of CLIP's class token (both paths) and position table (spatial).
      adapt_shifted_windows: in Swin, also adapt the shifted-window blocks; the paper adapts only
        the window blocks (App. B.1).
      dtype: compute dtype of the transformer; features and classifier are float32.
      scan_blocks, remat: see `ViT`.
      cls_token_only: if the backbone reads out its class token, its last block computes only that.
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
    spatial_dropout: float = 0.0
    time_kernel_size: int = 0
    readout_width: int = 0
    readout_frame_width: int = 0
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
        if self.temporal_position != "sincos3d" and not self.config.has_position_table:
            raise ValueError(
                f"temporal_position {self.temporal_position!r} takes the backbone's position "
                f"table, but {self.config.name} does not have one: use 'sincos3d'"
            )
        self.backbone = build_backbone(self.config, self.dtype, self.scan_blocks, self.remat)
        if self.time_kernel_size or self.readout_width or self.readout_frame_width:
            self._check_own_temporal_path()
        adapter = self.adapter.clone(dtype=self.dtype, parent=None)
        layout = self._frameset_layout()
        shifted = self.adapt_shifted_windows
        self.spatial_sites = ParallelAdapterHooks(adapter, shifted_windows=shifted, parent=None)
        self.temporal_sites = SerialAdapterHooks(
            adapter.clone(time_kernel_size=self.time_kernel_size, layout=layout, parent=None),
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
        if self.temporal_path and self.readout_width:
            features = self.config.feature_dim
            self.readout = OrderedReadout(
                self.readout_width,
                features,
                self.num_framesets,
                self.readout_frame_width,
                layout,
            )
        self.classifier = MlpClassifier(self.config.feature_dim, self.num_classes)

    def _init_spatial(self, rng: jax.Array) -> Any:
        """Initialize the parameters of the spatial path."""
        tokens = self.config.num_tokens
        params = {"adapters": self.backbone.init_hooks(rng, self.spatial_sites, 1, tokens)}
        if self.train_tokens and self.config.has_class_token:
            params["class_token"] = self.backbone.class_embedding
        if self.train_tokens and self.config.has_position_table:
            params["position"] = self.backbone.position_embedding
        return params

    def _init_temporal(self, rng: jax.Array) -> Any:
        """Initialize the parameters of the temporal path."""
        images, tokens = 1, self.config.num_tokens
        if self.time_kernel_size:  # the adapters see the framesets of a clip together
            images = self.num_framesets
            tokens = self.config.num_leading_tokens + math.prod(self._frameset_patches())
        adapters = self.backbone.init_hooks(rng, self.temporal_sites, images, tokens)
        params = {"adapters": adapters}
        if self.train_tokens and self.config.has_class_token:
            params["class_token"] = self.backbone.class_embedding
        if self.temporal_position == "learned":
            params["position"] = self._frameset_positions(self.backbone.position_embedding)
        return params

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the names of the paths that the model uses: "spatial", "temporal" or both."""
        used = {"spatial": self.spatial_path, "temporal": self.temporal_path}
        return tuple(name for name, is_used in used.items() if is_used)

    def _frameset_patches(self) -> tuple[int, int]:
        """Return the (rows, columns) of patches in a frameset."""
        across, down = self.grid
        patch = self.config.patch_size
        return down * self.frame_size // patch, across * self.frame_size // patch

    def _frameset_positions(self, table: jax.Array) -> jax.Array:
        """Return the backbone's position table for the patches of all framesets: [G, N, D]."""
        table = self.config.resize_positions(table, self._frameset_patches())
        return jnp.tile(table, (self.num_framesets, 1, 1))

    def _check_own_temporal_path(self) -> None:
        """Raise ValueError if the keys that the paper does not have do not fit the framesets."""
        if not self.config.has_global_attention:
            raise ValueError(
                "model.time_kernel_size and model.readout_width need the tokens of a ViT, but "
                f"{self.config.name} does not have global attention: leave them at 0"
            )
        if self.time_kernel_size and self.time_kernel_size % 2 == 0:
            raise ValueError(
                f"model.time_kernel_size={self.time_kernel_size} must be odd, or 0 for none"
            )
        if self.readout_frame_width and not self.readout_width:
            raise ValueError(
                f"model.readout_frame_width={self.readout_frame_width} needs model.readout_width, "
                "the channels of the tokens of which the features of frames are made"
            )
        by_frame = {
            "model.time_kernel_size": self.time_kernel_size,
            "model.readout_frame_width": self.readout_frame_width,
        }
        for name, value in by_frame.items():
            if value and self.frame_size % self.config.patch_size:
                raise ValueError(
                    f"{name}={value} needs frames of whole patches: {self.frame_size} pixels "
                    "(data.image_size / data.frame_scale) are not a multiple of "
                    f"{self.config.patch_size}, the patches of {self.config.name}"
                )

    def _frameset_layout(self) -> FramesetLayout:
        """Return where the frames are among the tokens of framesets."""
        side = self.frame_size // self.config.patch_size
        return FramesetLayout(
            self.num_framesets, tuple(self.grid), side, self.config.num_leading_tokens
        )

    def start_from_backbone(self, params: Any) -> Any:
        """Return `params` with class tokens and position tables copied from the backbone's."""
        backbone = params["backbone"]
        params = {**params, **{k: dict(params[k]) for k in ("spatial", "temporal") if k in params}}
        for path in ("spatial", "temporal"):
            if "class_token" in params.get(path, {}):
                params[path]["class_token"] = jnp.array(backbone["class_embedding"], jnp.float32)
            if "position" in params.get(path, {}):
                table = jnp.array(backbone["position_embedding"], jnp.float32)
                if path == "temporal":
                    table = self._frameset_positions(table)
                params[path]["position"] = table
        return params

    def _temporal_positions(self) -> jax.Array:
        """Return p_TP [G, N, D], the positions of the kind `temporal_position`.

        The class token has the position of the backbone's class token; registers have none.
        """
        if self.temporal_position == "learned":
            return self.temporal["position"]
        fixed = sincos3d(
            self.num_framesets,
            tuple(self.grid),
            self.frame_size,
            self.config.patch_size,
            self.config.width,
        )
        first = int(self.config.has_class_token)
        if not self.config.has_position_table:
            return jnp.pad(fixed, ((0, 0), (first, 0), (0, 0)))
        frozen = self._frameset_positions(self.backbone.position_embedding)
        if self.temporal_position == "clip":
            return frozen
        patches = frozen[:, first:] if self.temporal_position == "sincos3d+clip" else 0.0
        return jnp.concatenate([frozen[:, :first], fixed + patches], axis=1)

    def spatial_features(
        self, frames: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Map normalized frames [B, S, H, W, 3] to y_SP [B, e] float32 (eq. 7, 8)."""
        return self._features(frames, self._path_parts("spatial"), dropout_rng)

    def temporal_features(
        self, framesets: jax.Array, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """Map normalized framesets [B, G, H', W', 3] to y_TP [B, e] float32 (eq. 9, 10)."""
        if not self.readout_width:
            return self._features(framesets, self._path_parts("temporal"), dropout_rng)
        h = self._encode(framesets, self._path_parts("temporal"), dropout_rng)
        return self.readout(self.backbone.patch_features(h))

    def _path_parts(self, name: str) -> tuple[BlockHooks, Any, jax.Array | None]:
        """Return hooks, parameters and positions of the path "spatial" or "temporal".

        The positions are [N, D] for all images, [G, N, D] for the framesets of a clip, or None for
        the backbone's own.
        """
        if name == "spatial":
            return self.spatial_sites, self.spatial, self.spatial.get("position")
        return self.temporal_sites, self.temporal, self._temporal_positions()

    def _embed(self, images: jax.Array, class_token: Any, position: Any) -> jax.Array:
        """Map the images of each clip [B, images, H, W, 3] to tokens [(B images), N, D]."""
        if position is not None and position.ndim == 3:  # one table for each image of a clip
            position = jnp.tile(position, (images.shape[0], 1, 1))
        images = einops.rearrange(images, "b i h w c -> (b i) h w c")
        return self.backbone.embed(images, class_token, position)

    def _encode(
        self, images: jax.Array, path: Any, dropout_rng: Any, cls_token_only: bool = False
    ) -> jax.Array:
        """Run the blocks of one path on images [B, images, H, W, 3]; see `ViT.encode`."""
        hooks, params, position = path
        h = self._embed(images, params.get("class_token"), position)
        return self.backbone.encode(h, hooks, params["adapters"], dropout_rng, cls_token_only)

    def _features(self, images: jax.Array, path: Any, dropout_rng: Any) -> jax.Array:
        """Run one path and average over the images of a clip: [B, images, H, W, 3] -> [B, e]."""
        h = self._encode(images, path, dropout_rng, self.cls_token_only)
        features = self.backbone.pool(h).astype(jnp.float32)
        return einops.reduce(features, "(b i) e -> b e", "mean", b=images.shape[0])

    def attention(
        self,
        spatial: jax.Array | None,
        temporal: jax.Array | None,
        adapted: bool = True,
        all_blocks: bool = False,
    ) -> dict[str, jax.Array]:
        """Return the attention weights of each path, averaged over heads (Fig. 4, A1).

        Args:
          spatial: [B, S, H, W, 3], normalized frames; see `__call__`.
          temporal: [B, G, H', W', 3], normalized framesets; see `__call__`.
          adapted: use the class token and adapters of the path; otherwise the frozen backbone
            (eq. 2) with its own class token, at the same positions.
          all_blocks: return the weights of every block, not only those of the last.

        Returns:
          "spatial" [L', B, S, N, N] and "temporal" [L', B, G, N, N], for the paths in use: float32,
          tokens in the order of `embed`, rows (queries) sum to 1 over the last axis (keys); L' is L
          with `all_blocks`, else 1.

        Raises:
          ValueError: the backbone does not have a class token.
        """
        if not self.config.has_class_token:
            raise ValueError(
                f"{self.config.name} has no class token: attention maps need a backbone with one"
            )
        first = 0 if all_blocks else self.config.depth - 1
        inputs = {"spatial": spatial, "temporal": temporal}
        weights = {}
        for name in self.paths:
            hooks, params, position = self._path_parts(name)
            h = self._embed(inputs[name], params.get("class_token") if adapted else None, position)
            adaptation = (hooks, params["adapters"]) if adapted else (None, None)
            path_weights = self.backbone.attention(h, *adaptation, first=first)
            weights[name] = path_weights.reshape(
                len(path_weights), *inputs[name].shape[:2], *path_weights.shape[2:]
            )
        return weights

    def __call__(
        self,
        spatial: jax.Array | None,
        temporal: jax.Array | None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the logits of a batch of clips; see `registry.Method.build`.

        Args:
          spatial: [B, S, H, W, 3] frames, normalized with CLIP's mean and std; may be None if the
            model does not use the spatial path.
          temporal: [B, G, H', W', 3] framesets, normalized in the same way; may be None if the
            model does not use the temporal path.
          dropout_rng: key that switches on the dropout of adapters and of spatial features
            (training), or None.

        Returns:
          [B, classes] float32.

        Raises:
          ValueError: the model uses a path, but its input is None.
        """
        if temporal is None and self.temporal_path:
            raise ValueError(
                "the temporal path needs framesets [B, G, H', W', 3], but temporal is None"
            )
        if spatial is None and self.spatial_path:
            raise ValueError("the spatial path needs frames [B, S, H, W, 3], but spatial is None")
        rngs = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        drops = dropout_rng is not None and self.spatial_dropout and self.temporal_path
        batch_size = (spatial if self.spatial_path else temporal).shape[0]  # symbolic in exports
        zeros = jnp.zeros((batch_size, self.config.feature_dim), jnp.float32)
        y_sp = self.spatial_features(spatial, rngs[0]) if self.spatial_path else zeros
        if drops:
            rng = jax.random.fold_in(dropout_rng, 2)
            kept = jax.random.bernoulli(rng, 1 - self.spatial_dropout, (len(y_sp), 1))
            y_sp = jnp.where(kept, y_sp, 0.0)
        y_tp = self.temporal_features(temporal, rngs[1]) if self.temporal_path else zeros
        return self.classifier(jnp.concatenate([y_sp, y_tp], axis=-1))
