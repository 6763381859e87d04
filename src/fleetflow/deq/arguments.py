"""The published command-line options (deq-flow, torchdeq) and the `DEQ` module that they make."""

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from fleetflow.deq.anderson import Anderson
from fleetflow.deq.broyden import Broyden
from fleetflow.deq.checks import flag, number, rising, whole
from fleetflow.deq.gradients import Implicit, Phantom
from fleetflow.deq.newton_krylov import NewtonKrylov
from fleetflow.deq.picard import Picard
from fleetflow.deq.solve import Solution, fixed_point
from fleetflow.deq.vectors import State

SOLVERS = {
    "anderson": Anderson(),
    "broyden": Broyden(),
    "newton_krylov": NewtonKrylov(),
    "fixed_point_iter": Picard(),
    "simple_fixed_point_iter": Picard(),
    "naive_solver": Picard(),
}
STOP_MODES = ("abs", "rel")
RENAMED = {  # deq-flow -> here
    "f_thres": "f_max_iter",
    "b_thres": "b_max_iter",
    "f_eps": "f_tol",
    "b_eps": "b_tol",
    "eval_f_thres": "eval_f_max_iter",
    "phantom_grad": "grad",
    "n_losses": "n_states",
}
ELSEWHERE = {  # published option -> the values that ask for nothing more, and what to use for the others
    "wnorm": ((False,), "call weight_norm(module)"),
    "norm_type": (("none", "weight_norm"), "call spectral_norm(module)"),
    "norm_no_scale": ((False,), "call spectral_norm(module), whose scale is not learnt"),
    "norm_clip": ((False,), "call spectral_norm(module, clip=True)"),
    "norm_clip_value": ((1.0,), "call spectral_norm(module, clip=True), which clips at 1"),
    "norm_target_norm": ((1.0,), "call spectral_norm(module, limit=...)"),
    "sn_n_power_iters": ((1,), "call spectral_norm(module), which takes as many as it needs"),
    "safe_ift": ((False, True), ""),  # the implicit gradient is safe here
    "core": (("indexing", "sliced"), "call fixed_point in your own loop"),
    "sup_all": ((False,), "apply f to the state and train each image"),
    "sup_gap": ((-1,), "apply f to the state and train some images"),
    "sup_loc": (((), [], None), "apply f to the state and train some images"),
    "gamma": ((0.8,), "weigh the states where you add their losses"),
    "jac_loss_weight": ((0,), "add jacobian_penalty(f, z) to the loss"),
    "jac_loss_freq": ((0,), "add jacobian_penalty(f, z) to the loss at some steps"),
    "jac_incremental": ((0,), "raise the weight of jacobian_penalty(f, z) in the loss"),
    "sradius_mode": ((False,), "call spectral_radius(f, z)"),
}
COMMON = ("core", "gamma", "wnorm")  # which in a Namespace may belong to the rest of the program
SLICED = {"core": "sliced", "sliced_core": True, "indexing_core": False}  # what chose the sliced core


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    kind = type(default[0] if isinstance(default, tuple) and default else default)
    return field(default=default, metadata={"help": help, "choices": choices, "kind": int if kind is tuple else kind})


@dataclass(frozen=True)
class Options:
    """The options of `add_deq_args`, under their published names."""

    f_solver: str = _option("fixed_point_iter", "solver of the fixed point", tuple(SOLVERS))
    f_max_iter: int = _option(40, "evaluations of f at most")
    f_tol: float = _option(1e-3, "residual at which a sample has converged")
    f_stop_mode: str = _option("abs", "residual as it is, or relative to ||f(z)||", STOP_MODES)
    eval_factor: float = _option(1.0, "f_max_iter is multiplied by this in evaluation")
    eval_f_max_iter: int = _option(0, "f_max_iter in evaluation; 0 leaves it to eval_factor")
    b_solver: str = _option("fixed_point_iter", "solver of the implicit gradient", tuple(SOLVERS))
    b_max_iter: int = _option(40, "Jacobian products of the implicit gradient at most")
    b_tol: float = _option(1e-6, "residual at which the implicit gradient has converged")
    b_stop_mode: str = _option("abs", "residual as it is, or relative to the incoming gradient", STOP_MODES)
    ift: bool = _option(False, "implicit gradient instead of the phantom gradient")
    hook_ift: bool = _option(False, "the same as --ift, which needs no more memory here")
    grad: tuple = _option((1,), "steps of the phantom gradient")
    tau: float = _option(1.0, "damping of the phantom gradient")
    n_states: int = _option(1, "states returned in training, evenly spaced, the last one included")
    indexing: tuple = _option((), "evaluations after which a state is returned too, in training")

    def __post_init__(self):
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{item.name} is {value!r}; it must be one of {', '.join(choices)}")
        for name, least in (("f_max_iter", 1), ("eval_f_max_iter", 0), ("b_max_iter", 1), ("n_states", 1)):
            whole(name, getattr(self, name), least)
        for name in ("f_tol", "b_tol"):
            number(name, getattr(self, name), lambda tolerance: tolerance >= 0, "of 0 or more")
        few = f"that leaves 1 or more of f_max_iter ({self.f_max_iter})"
        number("eval_factor", self.eval_factor, lambda factor: 1 <= factor * self.f_max_iter < float("inf"), few)
        number("tau", self.tau, lambda tau: 0 < tau <= 1, "above 0 and at most 1")
        for name in ("ift", "hook_ift"):
            flag(name, getattr(self, name))
        for name in ("grad", "indexing"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be a tuple of whole numbers")
        if len(set(self.grad)) != 1:
            raise ValueError(f"grad is {list(self.grad)}; it must be one number of steps, the same for all states")
        whole("grad", self.grad[0])
        rising("indexing", self.indexing, self.f_max_iter)
        if self.n_states > self.f_max_iter:
            raise ValueError(f"n_states is {self.n_states}; it must be in 1 to f_max_iter ({self.f_max_iter})")
        if self.n_states > 1 and self.indexing:
            raise ValueError("n_states and indexing are both given; choose one of them")


def add_deq_args(parser: ArgumentParser) -> ArgumentParser:
    """Returns the parser with the options of `Options` added, under their names here and in deq-flow.

    `--wnorm` is for the network, as it is there: `if args.wnorm: apply_weight_norm(module)`.
    """
    group = parser.add_argument_group("deep equilibrium")
    for item in fields(Options):
        names = [item.name, *(theirs for theirs, ours in RENAMED.items() if ours == item.name)]
        names, help = [f"--{name}" for name in names], item.metadata["help"]
        if item.metadata["kind"] is bool:
            group.add_argument(*names, action="store_true", help=help)
        else:
            several: dict[str, Any] = (
                {"nargs": "+"} if isinstance(item.default, tuple) else {"choices": item.metadata["choices"]}
            )
            group.add_argument(*names, type=item.metadata["kind"], default=item.default, help=help, **several)
    group.add_argument("--wnorm", action="store_true", help="weight norm; the network applies it, by apply_weight_norm")
    return parser


def get_deq(args: Namespace | Mapping | None = None) -> "DEQ":
    """Returns the module that the options describe.

    Args:
        args: what `parser.parse_args()` returned (options of the rest of the program are left alone), or a mapping of
            option names to values. The names of `Options`, and those of deq-flow for the same.

    Raises:
        ValueError: For a published option that asks for what is done elsewhere here, and says where; for a name that is
            none; in a Namespace only for one that begins with f_, b_ or eval_f and is nearly one.
    """
    foreign = isinstance(args, Namespace)
    if not (args is None or foreign or isinstance(args, Mapping)):
        raise TypeError(f"args is {args!r}; it must be a Namespace, or a mapping of option names to values")
    given = dict(vars(args) if foreign else args or {})
    known = [item.name for item in fields(Options)]
    _check_names(given, known, foreign)
    for theirs, ours in RENAMED.items():
        if theirs in given and ours in given:
            raise ValueError(f"{theirs} and {ours} are both given; they are one option, choose one name")
        if theirs in given:
            given[ours] = given.pop(theirs)
    chosen = {name: given[name] for name in known if name in given}
    for name in {"grad", "indexing"} & set(chosen):
        value = chosen[name]
        chosen[name] = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value
    options = replace(Options(), **chosen)
    for name, value in SLICED.items():
        if name in given and given[name] == value and (options.n_states > 1 or options.indexing):
            raise ValueError(f"{name} is {value!r} with several states: call fixed_point again from each value instead")
    return DEQ(options)


def _check_names(given: dict, known: list[str], foreign: bool) -> None:
    """Raises ValueError for an option that `get_deq` would have to ignore."""
    for name, value in given.items():
        if name in ELSEWHERE and not (foreign and name in COMMON):
            nothing, instead = ELSEWHERE[name]
            if value not in nothing:
                raise ValueError(f"{name} is {value!r}, which get_deq does not do; leave it out and {instead}")
        if name in (*known, *RENAMED, *ELSEWHERE, *SLICED) or (foreign and not name.startswith(("f_", "b_", "eval_f"))):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near:
            raise ValueError(f'there is no option "{name}"; did you mean "{near[0]}"?')
        if not foreign:
            raise ValueError(f'there is no option "{name}"; known: {", ".join(known)}')


class DEQ(nn.Module):
    """Solves z = f(z) with options chosen beforehand; has no parameters of its own.

    In deq-flow `get_deq(args)` returns a class: `get_deq(args)(args)` makes another one here, too.

    In training the states carry the gradient of the options (`ift`, `grad`, `tau`), and `n_states` or `indexing` may
    add earlier ones. In evaluation there is one state, without a gradient, after up to `eval_f_max_iter` evaluations.
    """

    def __init__(self, options: Options | None = None):
        super().__init__()
        self.options = options = options or Options()
        self.gradient = Phantom(options.grad[0], options.tau)
        if options.ift or options.hook_ift:
            self.gradient = Implicit(
                SOLVERS[options.b_solver], options.b_tol, options.b_max_iter, options.b_stop_mode == "rel"
            )

    def __call__(self, *arguments):
        if len(arguments) == 1 and isinstance(arguments[0], Namespace | Mapping):
            return get_deq(arguments[0])
        return super().__call__(*arguments)

    def forward(
        self, f: Callable[..., State], z0: State, log: bool = False, sradius_mode: bool = False
    ) -> tuple[list[State], Solution]:
        """Returns the states, the fixed point last, and the `Solution` with residual, steps and trace.

        Args:
            z0: a tensor, for which f is called as f(z), or a tuple (z1, z2), for which it is called as f(z1, z2) and
                returns a tuple.
            log, sradius_mode: deq-flow's; the solution holds what a log would, and the spectral radius is a call of
                its own.
        """
        if sradius_mode:
            raise ValueError("sradius_mode is True, which this does not do; call spectral_radius(f, z) on the result")
        options = self.options
        steps, keep = options.f_max_iter, tuple(options.indexing)
        if options.n_states > 1:
            keep = tuple(k * (steps // options.n_states) for k in range(1, options.n_states))
        if not self.training:
            steps, keep = options.eval_f_max_iter or int(steps * options.eval_factor), ()
        solution = fixed_point(
            f if not isinstance(z0, tuple | list) else lambda z: f(*z),
            z0,
            SOLVERS[options.f_solver],
            self.gradient if self.training else None,
            tolerance=options.f_tol,
            max_steps=steps,
            relative=options.f_stop_mode == "rel",
            keep=keep,
        )
        return [*solution.kept, solution.value], solution
