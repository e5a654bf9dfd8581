"""Which part of a parameter's matrix each process holds."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class MatrixShard:
    """A rectangle of a matrix [rows, columns], in its coordinates; may be empty."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of it."""
        return max(0, self.bottom - self.top), max(0, self.right - self.left)

    @property
    def numel(self) -> int:
        """Elements in it."""
        return self.shape[0] * self.shape[1]

    def rows_within(self, start: int, stop: int) -> MatrixShard:
        """What it has of the rows [start, stop), in their coordinates."""
        return MatrixShard(
            max(self.top, start) - start, min(self.bottom, stop) - start, self.left, self.right
        )

    def of(self, matrix: Tensor) -> Tensor:
        """A view of this part of a whole matrix."""
        rows, columns = self.shape
        return matrix.narrow(0, min(self.top, matrix.shape[0]), rows).narrow(1, self.left, columns)


FSDP1_ADVICE = (
    "FSDP1 (FullyShardedDataParallel) flattens parameters, so that no matrices are left: shard the "
    "model with FSDP2 (torch.distributed.fsdp.fully_shard)"
)
ZERO_ADVICE = (
    "DeepSpeed's ZeRO, if that has flattened it, leaves no matrices: shard the model with FSDP2, "
    "or train with ZeRO stage 0"
)


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 has made a vector of a parameter, or of several."""
    return param.ndim < 2 and is_of_fsdp1(param)


def is_of_fsdp1(param: Tensor) -> bool:
    """Whether a parameter is, or is a part of, one that FSDP1 has flattened."""
    return bool(getattr(param, "_fsdp_flattened", False))


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is distributed, without importing what makes such tensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def in_parts(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether processes hold different parts of a tensor."""
    return is_dtensor(tensor) and any(_is_split(placement) for placement in tensor.placements)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shape_only(param: Tensor) -> Tensor:
    """A tensor of a parameter's whole shape, dtype and device: itself, or one without memory."""
    if not is_dtensor(param):
        return param
    return local_part(param.detach()).new_empty(1).expand(param.shape)


def sharded_group(param: DTensor) -> ProcessGroup | None:
    """The processes that hold different parts of a parameter; None if all hold all of it.

    Raises ValueError for sums that were not reduced.
    """
    mesh, placements = param.device_mesh, param.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"params: expected shards or copies, got placements {placements}")
    sharded = [index for index, placement in enumerate(placements) if _is_split(placement)]
    if not sharded:
        return None
    if len(sharded) == 1:
        return mesh.get_group(sharded[0])
    if mesh.mesh_dim_names is None:
        raise ValueError(
            "params: expected a device mesh with mesh_dim_names for parameters that are sharded "
            f"along several of its dimensions, got {mesh}"
        )
    part = mesh[tuple(mesh.mesh_dim_names[index] for index in sharded)]
    return part._flatten().get_group()


def _is_split(placement: Any) -> bool:
    return not placement.is_replicate()


def local_shard(param: Tensor, row_dims: int) -> MatrixShard:
    """What this process holds of a parameter that is a matrix, by its first dimensions as rows.

    Raises ValueError for a sharding that leaves no rectangle of that matrix.
    """
    full, k = tuple(param.shape), row_dims
    if not is_dtensor(param):
        return MatrixShard(0, math.prod(full[:k]), 0, math.prod(full[k:]))
    # Not public, and the one place where uneven, strided and nested shards are worked out.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    if len(full) == k == 1:  # a vector is a column
        return MatrixShard(offset[0], offset[0] + size[0], 0, 1)
    if tuple(size[1:k]) != full[1:k] or tuple(size[k + 1 :]) != full[k + 1 :]:
        raise ValueError(
            f"params: expected a parameter of size {full} to be sharded along the rows or columns "
            f"of its matrix, got placements {param.placements}"
        )
    row, column = math.prod(full[1:k]), math.prod(full[k + 1 :])
    top, left = offset[0] * row, offset[k] * column
    return MatrixShard(top, top + size[0] * row, left, left + size[k] * column)
