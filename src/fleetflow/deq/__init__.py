"""Fixed points z = f(z), their gradients, and what equilibrium networks need around them. Imports torch only.

solution = fixed_point(f, z0, Anderson(), Implicit(Anderson()), tolerance=1e-4, max_steps=40)
"""

from fleetflow.deq.anderson import Anderson
from fleetflow.deq.arguments import DEQ, Options, add_deq_args, get_deq
from fleetflow.deq.broyden import Broyden
from fleetflow.deq.diagnostics import jacobian_penalty, plot_convergence, spectral_radius
from fleetflow.deq.gradients import Implicit, Phantom, Unrolled
from fleetflow.deq.newton_krylov import NewtonKrylov
from fleetflow.deq.picard import Picard
from fleetflow.deq.published import DEQWrapper, apply_weight_norm, reset_weight_norm
from fleetflow.deq.regularize import VariationalDropout, held, remove_norm, reset_dropout, spectral_norm, weight_norm
from fleetflow.deq.solve import Gradient, NotFinite, Solution, Solver, fixed_point

__all__ = [
    "DEQ",
    "DEQWrapper",
    "Anderson",
    "Broyden",
    "Gradient",
    "Implicit",
    "NewtonKrylov",
    "NotFinite",
    "Options",
    "Phantom",
    "Picard",
    "Solution",
    "Solver",
    "Unrolled",
    "VariationalDropout",
    "add_deq_args",
    "apply_weight_norm",
    "fixed_point",
    "get_deq",
    "held",
    "jacobian_penalty",
    "plot_convergence",
    "remove_norm",
    "reset_dropout",
    "reset_weight_norm",
    "spectral_norm",
    "spectral_radius",
    "weight_norm",
]
