"""The Gaussian process: noise-aware log expected improvement (BoTorch), its Pareto form, and the fully Bayesian model.

Outcomes are differences to trial 0 with the standard error of paired differences as known noise, so that a trial on few
tokens and one on many live in one model, each with its own weight. Proposals hang on the journal, the seed and the
trial's number alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .baselines import propose_sobol
from .dimensions import Choice
from .journal import Trial
from .problem import Proposal, View, cost_axis
from .space import Space

__all__ = ["compress", "coverage", "expand", "fit_surrogate", "propose_gp", "unit_of"]

# Differences above this are squeezed: how bad a bad candidate is teaches nothing about where the good ones lie.
SQUEEZE = 0.15
NOISE_FLOOR = 2e-3  # standard error below which trials are not told apart; trial 0 would have 0
# Standard errors count so many times over: they say how other text would move a difference, but scores that move
# smoothly also change plans by jumps. On searches of SmolLM2-135M with 60 trials, predictions of the trials to come had
# the highest likelihood with 3, and 80 % intervals held 89 % (of trials by `gp`) and 70 % (of random ones) of them;
# with 1 and the default RBF kernel 63 % and 70 %.
ROUGHNESS = 3.0
STEP = 0.3  # how fast intervals widen or narrow by what they held
NUTS: dict[str, Any] = {"warmup_steps": 128, "num_samples": 128, "thinning": 16}
POOL, RESTARTS, SAMPLES = 384, 4, 64
# How far quasi-random candidates lie from trial 0, as shares of the way to a point of the whole space. Of 9 candidates
# over the whole space, 20 % to 600 % worse than trial 0 each, a model learns hardly more than to stay away.
INITIAL = (0.1, 0.2, 0.4)
NEAR = (0.02, 0.1, 0.3)  # how far initial conditions stray from the best points, as shares of the way to a random one


def compress(value: float) -> float:
    """The outcome transform: the identity up to `SQUEEZE`, logarithmic beyond, smooth and increasing.

    Args:
        value (`float`): a difference to trial 0; lower is better.
    """
    if value <= SQUEEZE:
        return value
    return SQUEEZE * (1 + math.log(value / SQUEEZE))


def expand(value: float) -> float:
    """The inverse of [`compress`]; of what is squeezed to more than 5, that of 5.

    Args:
        value (`float`): a squeezed difference.
    """
    return SQUEEZE * math.exp(min(value, 5.0) / SQUEEZE - 1) if value > SQUEEZE else value


def _slope(value: float) -> float:
    return 1.0 if value <= SQUEEZE else SQUEEZE / value


def unit_of(view: View, known: Sequence[tuple[Trial, float, float]]) -> float:
    """What differences and their errors are divided by, so that `SQUEEZE` and `NOISE_FLOOR` fit them.

    Both are meant for differences of logarithms. Of other objectives nobody knows the scale, nor what a large
    difference is: there the usual one (the median of those that are not 0) becomes `SQUEEZE`.

    Args:
        view ([`View`]): whether objectives are compared by logarithms.
        known (sequence): trials with their difference to trial 0 and its standard error.
    """
    sizes = sorted(abs(value) for _, value, _ in known if value)
    if view.logarithmic or not sizes:
        return 1.0
    return sizes[len(sizes) // 2] / SQUEEZE


def propose_gp(view: View, count: int) -> Sequence[Proposal]:
    """Quasi-random candidates around trial 0 first, then the maximisers of log noisy expected improvement (2310.20708).

    Of several proposals each knows of those before it as pending. With `view.cost` the acquisition is log noisy
    expected hypervolume improvement.

    Args:
        view ([`View`]): the journal so far.
        count (`int`): how many.
    """
    initial = view.config.initial
    known = [entry for entry in view.observations() if _fits(view.space, entry[0]) and math.isfinite(entry[1])]
    if view.done < initial or len(known) < 3:
        return [
            Proposal(_near_default(view, proposal.point, INITIAL[(view.done + place) % len(INITIAL)]))
            for place, proposal in enumerate(propose_sobol(view, count))
        ]
    _load()
    from botorch.exceptions import BotorchWarning

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", BotorchWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # of optimisers that stop at their step limit
        torch.manual_seed(view.seed * 1_000_003 + view.number)
        model, inputs, outcomes, noise = fit_surrogate(view, known)
        unit = unit_of(view, known)
        proposals: list[Proposal] = []
        pending: list[torch.Tensor] = []
        for _ in range(count):
            acquisition = _acquisition(view, model, inputs, outcomes, torch.stack(pending) if pending else None)
            point = _best_point(view.space, acquisition, inputs, outcomes[:, 0])
            vector = view.space.encode(point)
            pending.append(vector)
            mean, deviation = _expected(model, vector, noise)
            deviation *= widening(known, logarithmic=view.logarithmic)
            if not view.logarithmic:
                # Its unit moves with every trial, so what is written down is a difference as it is measured.
                mean, deviation = unit * expand(mean), unit * deviation / _slope(expand(mean))
            proposals.append(Proposal(point, (mean, deviation)))
    return proposals


def _near_default(view: View, point: Mapping[str, Any], step: float) -> dict[str, Any]:
    """A point on the way from trial 0 to another one; convex combinations keep every linear equality.

    The farthest ones take over the other one's choices. The ratio of a Pareto search has to be spread, whatever
    trial 0's is.
    """
    space = view.space
    start, far = space.encode(space.default), space.encode(point)
    moved = (1 - step) * start + step * far
    for dimension, span in space.spans():
        if isinstance(dimension, Choice):
            moved[span] = (far if step == max(INITIAL) else start)[span]
        elif view.cost is not None and dimension.path == "pruning_ratio":
            moved[span] = far[span]
    return space.decode(moved)


def _fits(space: Space, trial: Trial) -> bool:
    """Whether the space alone makes a trial: those of strategies that refine an allocation lie outside it."""
    return space.holds(trial.point) and len(trial.point) == len(space.dimensions)


def _load() -> None:
    """Import the libraries; what they warn of while they load (deprecated torch functions) is theirs to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import botorch
        import botorch.acquisition.multi_objective.logei
        import botorch.models.fully_bayesian  # noqa: F401


def fit_surrogate(
    view: View, known: Sequence[tuple[Trial, float, float]]
) -> tuple[Any, torch.Tensor, torch.Tensor, float]:
    """A Gaussian process of the negated, compressed differences to trial 0, in units of [`unit_of`].

    Args:
        view ([`View`]): space and config.
        known (sequence): trials of the space with their difference and its standard error.

    Returns:
        `tuple`: the model, inputs `[trials, width]`, outcomes `[trials, 1 or 2]` (higher is better), and the variance
        that a new observation's noise will typically have.
    """
    _load()
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import ModelListGP, SingleTaskGP
    from botorch.models.transforms import Normalize, Standardize
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
    from gpytorch.mlls import ExactMarginalLogLikelihood, SumMarginalLogLikelihood

    unit = unit_of(view, known)
    known = [(trial, value / unit, error / unit) for trial, value, error in known]
    inputs = torch.stack([view.space.encode(trial.point) for trial, _, _ in known])
    values = torch.tensor([[-compress(value)] for _, value, _ in known], dtype=torch.float64)
    errors = torch.tensor([[error * _slope(value)] for _, value, error in known], dtype=torch.float64)
    variances = None if bool(errors.isnan().any()) else (ROUGHNESS * errors.clamp(min=NOISE_FLOOR)).square()
    typical = float(variances.median()) if variances is not None else 0.0
    bounds, width = view.space.bounds(), view.space.width
    options: dict[str, Any] = {
        "input_transform": Normalize(width, bounds=bounds),
        "outcome_transform": Standardize(1),
    }
    if view.config.surrogate == "saas" and view.cost is None:
        from botorch.fit import fit_fully_bayesian_model_nuts
        from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP

        saas = SaasFullyBayesianSingleTaskGP(inputs, values, variances, **options)
        fit_fully_bayesian_model_nuts(saas, **NUTS, disable_progbar=True)
        return saas, inputs, values, typical
    # Rougher than the default RBF, with the same priors that scale with the number of dimensions (2402.02229).
    kernel = get_covar_module_with_dim_scaled_prior(ard_num_dims=width, use_rbf_kernel=False)
    model: Any = SingleTaskGP(inputs, values, variances, covar_module=kernel, **options)
    if view.cost is None:
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model, inputs, values, typical
    costs = torch.tensor([[-cost_axis(trial, view.cost)] for trial, _, _ in known], dtype=torch.float64)
    other = SingleTaskGP(
        inputs, costs, torch.full_like(costs, float(costs.var().clamp(min=1e-12)) * 1e-6),
        input_transform=Normalize(width, bounds=bounds), outcome_transform=Standardize(1),
    )  # fmt: skip
    both = ModelListGP(model, other)
    fit_gpytorch_mll(SumMarginalLogLikelihood(both.likelihood, both))
    return both, inputs, torch.cat([values, costs], dim=1), typical


def _acquisition(
    view: View, model: Any, inputs: torch.Tensor, outcomes: torch.Tensor, pending: torch.Tensor | None
) -> Any:
    from botorch.sampling import SobolQMCNormalSampler

    sampler = SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=view.seed * 1_000_003 + view.number)
    if view.cost is None:
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement

        return qLogNoisyExpectedImprovement(
            model, X_baseline=inputs, sampler=sampler, X_pending=pending, prune_baseline=True
        )
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
    from botorch.utils.multi_objective.hypervolume import infer_reference_point
    from botorch.utils.multi_objective.pareto import is_non_dominated

    reference = infer_reference_point(outcomes[is_non_dominated(outcomes)])
    return qLogNoisyExpectedHypervolumeImprovement(
        model, ref_point=reference.tolist(), X_baseline=inputs, sampler=sampler, X_pending=pending,
        prune_baseline=True, objective=IdentityMCMultiOutputObjective(),
    )  # fmt: skip


def _best_point(space: Space, acquisition: Any, inputs: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
    """The point that maximises an acquisition: a pool of starts, the best of them refined under the equalities."""
    from botorch.optim import optimize_acqf

    starts = _starts(space, inputs, values)
    with torch.no_grad():
        scores = torch.cat([acquisition(part[:, None]) for part in starts.split(128)])
    order = scores.argsort(descending=True)
    best, best_score = starts[order[0]], float(scores[order[0]])
    choices = _choice_columns(space)
    equalities = space.equalities() or None
    for index in order[:RESTARTS].tolist():
        start = starts[index]
        fixed = {column: float(start[column]) for column in choices}
        with _quiet():
            found, score = optimize_acqf(
                acquisition, space.bounds(), q=1, num_restarts=1, batch_initial_conditions=start[None, None],
                fixed_features=fixed or None, equality_constraints=equalities, options={"maxiter": 40},
                retry_on_optimization_warning=False,
            )  # fmt: skip
        if score is not None and torch.isfinite(found).all() and float(score) > best_score:
            best, best_score = found[0], float(score)
    return space.decode(best)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimiser that stops early still returns its best point
        yield


def _choice_columns(space: Space) -> list[int]:
    return [
        column
        for dimension, span in space.spans()
        if isinstance(dimension, Choice)
        for column in range(span.start, span.stop)
    ]


def _starts(space: Space, inputs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Starts for the optimiser, `[starts, width]`: random points, and points near the best ones.

    Convex combinations of two points keep every linear equality; choices come from one of the two.
    """
    draws = torch.rand(POOL, space.width, dtype=torch.float64)
    random = torch.stack([space.encode(space.from_cube(draw)) for draw in draws])
    best = inputs[values.argsort(descending=True)[:3]]
    pieces = [random[: POOL // 4], best]
    choices = _choice_columns(space)
    for number in range(POOL // 4, POOL):
        center, far = best[number % len(best)], random[number]
        step = NEAR[number % len(NEAR)]
        # Some only move in a few dimensions: a step along all of them at once is rarely an improvement.
        mixed = center.clone()
        for dimension, span in space.spans():
            if isinstance(dimension, Choice):
                continue
            if number % 2 or float(torch.rand(())) < 0.4:
                mixed[span] = (1 - step) * center[span] + step * far[span]
        if choices and float(torch.rand(())) < 0.2:
            mixed[choices] = far[choices]
        pieces.append(mixed[None])
    return torch.cat(pieces)


def _expected(model: Any, vector: torch.Tensor, noise: float) -> tuple[float, float]:
    with torch.no_grad():
        posterior = model.posterior(vector[None])
    mean = getattr(posterior, "mixture_mean", posterior.mean)[..., 0].mean()
    variance = getattr(posterior, "mixture_variance", posterior.variance)[..., 0].mean()
    return -float(mean), math.sqrt(float(variance) + noise)


def widening(known: Sequence[tuple[Trial, float, float]], level: float = 0.8, logarithmic: bool = True) -> float:
    """The factor on predicted deviations that the predictions so far ask for.

    Adaptive conformal inference (Gibbs and Candes, 2106.00170): an interval that missed its trial widens the next ones,
    one that held it narrows them, in the proportion that lets `level` of them hold in the long run. A maximiser of an
    acquisition is where the model errs most, so its own deviation is too small there.

    Args:
        known (sequence): trials with their measured difference to trial 0 and its standard error, in order.
        level (`float`, *optional*, defaults to 0.8): of the intervals.
        logarithmic (`bool`, *optional*, defaults to `True`): see [`coverage`].
    """
    factor = 0.0
    for trial, value, _ in known:
        if trial.predicted is not None and trial.answered_by is None:
            held, _ = coverage([(trial, value)], level, logarithmic)
            factor += STEP * (level - 1 if held else level)
    return math.exp(factor)


def coverage(trials: Sequence[tuple[Trial, float]], level: float = 0.8, logarithmic: bool = True) -> tuple[int, int]:
    """How many predicted trials fell into their central prediction interval, and how many were predicted.

    Args:
        trials (sequence): trials with their measured difference to trial 0; those without a prediction are left out.
        level (`float`, *optional*, defaults to 0.8): of the interval.
        logarithmic (`bool`, *optional*, defaults to `True`): differences are those of logarithms, which are predicted
            as [`compress`] makes them; others are predicted as they are.
    """
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    inside = total = 0
    for trial, value in trials:
        if trial.predicted is None or trial.answered_by is not None:
            continue
        mean, deviation = trial.predicted
        total += 1
        inside += abs((compress(value) if logarithmic else value) - mean) <= z * deviation
    return inside, total
