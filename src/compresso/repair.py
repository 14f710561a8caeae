"""Change what stays so that it stands in for what goes, from statistics of the dense model; nothing is trained."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.calibration import Moments, output_paths
from compresso.float64 import in_float64
from compresso.plan import Plan
from compresso.shape import rows_of

DAMPING = 0.01  # of the mean diagonal of the Gram matrix


def kept_columns(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    """For every matrix that units feed, the columns whose units stay."""
    found = {}
    for i, unit, path in output_paths(model):
        found[path] = rows_of(plan.keep[unit][i], plan.shape.layers[i].columns(unit))
    return found


@torch.no_grad()
def refit(model: PreTrainedModel, plan: Plan, moments: dict[str, Moments], damping: float = DAMPING) -> None:
    """Refit the columns that stay to what the whole matrix gave, by ridge regression on calibration inputs.

    With G the Gram matrix of the inputs and K the kept columns, W_K becomes (W G_{:,K} + r W_K) (G_{K,K} + r)^-1, which
    minimises the squared error of the outputs plus r times the squared change; r is `damping` times the mean diagonal
    of G. The idea is that of SlimGPT (arXiv 2412.18110) and Olica (2506.08436).
    """
    for path, kept in kept_columns(model, plan).items():
        matrix, gram = model.get_submodule(path), moments[path].gram
        assert gram is not None
        if not 0 < len(kept) < gram.shape[0]:
            continue
        gram = in_float64(gram)
        kept = kept.to(gram.device)
        weight, ridge = in_float64(matrix.weight).T, damping * float(gram.diagonal().mean())
        inner = gram[kept][:, kept] + ridge * torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
        solved = torch.linalg.solve(inner, gram[kept] @ weight + ridge * weight[kept])
        matrix.weight[:, kept.to(matrix.weight.device)] = solved.T.to(matrix.weight)


@torch.no_grad()
def add_biases(model: PreTrainedModel, plan: Plan, means: dict[str, Tensor]) -> bool:
    """Give every output matrix the mean of what its removed columns gave as a bias (FLAP, arXiv 2312.11983, eq. 6).

    False, and nothing done, for a model that has no such biases and whose config knows none. Other matrices that the
    config gives a bias with them get zeros.
    """
    columns = kept_columns(model, plan)
    if any(model.get_submodule(path).bias is None for path in columns):
        if not (hasattr(model.config, "attention_bias") and hasattr(model.config, "mlp_bias")):
            return False
        model.config.attention_bias = model.config.mlp_bias = True
    for path, kept in columns.items():
        block = model.get_submodule(path.rpartition(".")[0])
        for module in block.children():
            if isinstance(module, nn.Linear) and module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)
        matrix = model.get_submodule(path)
        gone = torch.ones(matrix.weight.shape[1], dtype=torch.bool)
        gone[kept] = False
        gone = gone.to(matrix.weight.device)
        matrix.bias += (matrix.weight[:, gone].float() @ means[path][gone]).to(matrix.bias.dtype)
    return True
