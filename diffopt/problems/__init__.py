"""Problems: what is minimised, subject to what, and in which parameters."""

from diffopt.problems.base import DifferentiableProblem, NonlinearForm, Param
from diffopt.problems.forms import Derivatives, Form, QPForm
from diffopt.problems.qp import QPStructure, QuadraticProgram
from diffopt.problems.structure import absent, fixed, given, learned

__all__ = [
    "Derivatives",
    "DifferentiableProblem",
    "Form",
    "NonlinearForm",
    "Param",
    "QPForm",
    "QPStructure",
    "QuadraticProgram",
    "absent",
    "fixed",
    "given",
    "learned",
]
