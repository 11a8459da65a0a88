"""Plant faults in the core, one at a time, and see that a test fails for each: ``make mutations``.

Each fault is a replacement in a file of a copy of the tree, or several that take out one thing together. A fault that no
test notices ("survived"), or a text that is no longer in its file, makes the run fail; so does one that takes out what
handles a family of hard problems (`hard_families.py`, ``faults``) and fails no test of that family.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hard_families import FAMILIES


class Fault(NamedTuple):
    """``name``; ``file`` below diffopt/; ``old`` becomes ``new``; ``tests`` that may notice it; ``also``: more (file, old,
    new), where several pieces of code cover each other."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    also: tuple[tuple[str, str, str], ...] = ()


GRADIENTS = "test_implicit.py test_active_system.py test_gates.py test_optimal_value.py test_pulled.py"

FAULTS = [
    Fault("sign of the gradient through K", "active_solve.py", "-g.sum_to_size(t.shape)", "g.sum_to_size(t.shape)", GRADIENTS),
    Fault("dG without its lam term", "kkt.py", "+ rmatvec(form.A, w.eq) + rmatvec(form.G, lam)",
          "+ rmatvec(form.A, w.eq) + rmatvec(form.G, lam).detach()", GRADIENTS),
    Fault("mean instead of sum over the batch", "implicit.py", "        w = w.minus(step)",
          "        w = w.minus(Blocks(*(v / max(len(v), 1) for v in step)))", GRADIENTS),
    Fault("status always solved", "backends/base.py", "found = graded(worst, tolerance)",
          "return torch.full_like(status, Status.SOLVED)", "solvers/test_pdipm.py"),
    Fault("residuals not checked", "solution.py", "torch.where(worst <= tolerance, _SOLVED, status)",
          "torch.full_like(status, _SOLVED)", "test_layer.py test_contract.py"),
    Fault("sign of the equality dual", "solvers/pdipm.py", "eq * state.nu / cost", "-eq * state.nu / cost", "laws/test_executors_agree.py"),
    Fault("sign of a bound's dual", "kkt.py", "((form.lower, point.lam_lower, -1)", "((form.lower, point.lam_lower, 1)", "test_kkt.py"),
    Fault("dQ not symmetric", "linalg/matrices.py", "self._entries = 0.5 * (self.given + self.given.mT)", "self._entries = self.given",
          "problems/test_forms.py"),
    Fault("failed instances get a finite gradient", "active_system.py", "spoiled = ((self.failed & asked) | poisoned)",
          "spoiled = (poisoned & poisoned)", GRADIENTS),
    Fault("only the active rows of a failed instance", "implicit.py", "row=active.row | bad", "row=active.row & ~bad", GRADIENTS),
    # The compiled executor, which is compiled anew for each.
    Fault("sign of the slopes of multipliers, in lanes", "solvers/cpu/pullback.hpp", "P::store(ry + r * S, -y * unit);",
          "P::store(ry + r * S, y * unit);", "solvers/test_cpu_hard.py solvers/test_cpu_bits.py"),
    Fault("sign of the slope of a lower bound's multiplier", "solvers/cpu/pullback.hpp", "if (!forward) return low ? -value(glower)",
          "if (!forward) return low ? value(glower)", "laws/test_executors_agree.py"),
    Fault("compiled: a line that is not whole is lost", "solvers/cpu/pullback.hpp", "std::copy_n(stage, filled, target);", "(void)filled;",
          "solvers/test_cpu_hard.py solvers/test_cpu_bits.py"),
    Fault("a factor of one row broadcasts", "problems/forms.py", "(Q.factor.dim() < 2 or Q.factor.shape[-2] != n)", "(Q.factor.dim() < 2)",
          "problems/test_forms.py"),
    Fault("a value read in inference mode stays there", "solution.py", "torch.inference_mode(False) if inside else", "nullcontext() if inside else",
          "test_solution.py"),
    Fault("a selection's value from changed data", "selected.py", "optimal_value.unless_changed(form, point._asdict(), value)", "value",
          "test_solution.py"),
    Fault("a layer cuts the gradient of a fixed value", "layer.py", 'if declared.kind == "fixed" and part.requires_grad:', "if False:",
          "test_layer.py"),
    Fault("half of a pair passes where the shapes are known", "problems/forms.py", "None if A is None and b is None else", "None if A is None else",
          "problems/test_forms.py"),
    Fault("compiled: what waits for its polish goes on", "solvers/cpu/dual.hpp", "running = running & none_of(due) & able;",
          "running = running & able;", "solvers/test_cpu_hard.py solvers/test_cpu_bits.py"),
    Fault("compiled: counts of what waits go on", "solvers/cpu/dual.hpp", "select(running, Number{} + 1.0, Number{})", "Number{} + 1.0",
          "solvers/test_cpu_hard.py solvers/test_cpu_bits.py"),
    Fault("vectors of an answer in another order", "packed.py", "sizes = (m, p, m, n, n)", "sizes = (p, m, m, n, n)", "test_packed.py"),
    Fault("read first where nothing is recorded", "pulled.py", "with torch.inference_mode(False), torch.set_grad_enabled(attached):", "if True:",
          "test_packed.py"),
    Fault("compiled: status always solved", "solvers/cpu/batch.hpp", "return residual <= options.claim ? SOLVED",
          "return residual < 1e300 ? SOLVED", "backends/test_base.py test_fuzz.py"),
    Fault("compiled: certificates not checked", "solvers/cpu/certify.hpp", "return error * k.reach(v, 1) <= CLAIM;", "return true;",
          "test_hard_families.py"),
    Fault("compiled: multipliers without the objective's scale", "solvers/cpu/certify.hpp", "k.row[r] * v.z[r] * k.force / k.cost : 0.0",
          "k.row[r] * v.z[r] * k.force : 0.0", "laws/test_executors_agree.py"),
    Fault("compiled: weakly active rows held", "solvers/cpu/certify.hpp", "weak_[r] = held && !is_weak;", "weak_[r] = held;",
          "solvers/test_cpu_hard.py solvers/test_cpu_bits.py"),
    Fault("compiled: the factor of another active set", "solvers/cpu/general.hpp",
          "if (held_last_ && std::equal(marks, marks + k.rows, held_))", "if (held_last_)", "laws/test_warm_start.py"),
    Fault("compiled: more active rows than variables", "solvers/cpu/polish.hpp", "many > static_cast<double>(k.n)",
          "many > 1e9 + static_cast<double>(k.n)", "solvers/test_cpu_hard.py solvers/test_cpu_bits.py"),
    # What each family of hard problems needs: in the compiled executor, then in torch operations.
    Fault("compiled: Q is taken as given, not its symmetric part", "solvers/cpu/scaled.hpp",
          "0.5 * (value(source[r * n + c]) + value(source[c * n + r]))", "value(source[r * n + c])", "test_hard_families.py"),
    Fault("compiled: crossing bounds pass", "solvers/cpu/scaled.hpp", "return most > 0 ? CROSSED : SOUND;", "return SOUND;",
          "test_hard_families.py"),
    Fault("compiled: NaN passes", "solvers/cpu/scaled.hpp", "bool wrong = !(finite == 0);", "bool wrong = finite > 0;", "test_hard_families.py"),
    Fault("compiled: sides of -inf pass", "solvers/cpu/scaled.hpp", "wrong |= !(d[r] > -INF);", "wrong |= std::isnan(d[r]);",
          "test_hard_families.py"),
    Fault("compiled: fixed variables are two bounds", "solvers/cpu/scaled.hpp", "if (-d[lower_at + j] == d[upper_at + j]) {",
          "if (-d[lower_at + j] > d[upper_at + j]) {", "test_contract.py"),
    Fault("compiled: infinite sides are sides", "solvers/cpu/scaled.hpp", "const bool here = d[at + j] < INF &&",
          "const bool here = d[at + j] <= INF &&", "test_hard_families.py"),
    Fault("compiled: far sides count in full", "solvers/cpu/cone.hpp", "vmax(vabs(side) * (1 / FAR), Vec{} + 1.0)",
          "vmax(vabs(side) * 0.0, Vec{} + 1.0)", "test_hard_families.py"),
    Fault("compiled: no problem of least infeasibility", "solvers/cpu/certify.hpp",
          "if (proves_infeasible(least_infeasibility()) || proves_infeasible(seen_closer())) return PRIMAL_INFEASIBLE;", "",
          "test_hard_families.py"),
    Fault("compiled: small contradictions are not seen closer", "solvers/cpu/certify.hpp", " || proves_infeasible(seen_closer())", "",
          "test_hard_families.py"),
    Fault("compiled: no problem of steepest recession", "solvers/cpu/certify.hpp",
          "if (proves_unbounded(steepest_recession())) return DUAL_INFEASIBLE;", "", "test_hard_families.py"),
    Fault("compiled: rounding errors prove something", "solvers/cpu/general.hpp", "sum > NOISE * size ? sum : 0.0", "sum > 0 ? sum : 0.0",
          "test_hard_families.py"),
    Fault("compiled: indefinite Hessians pass", "solvers/cpu/general.hpp", "if (!strictly_convex && !convex()) {", "if (false) {",
          "test_hard_families.py"),
    Fault("compiled: no eigenvalue is a rounding error", "solvers/cpu/general.hpp", "NEGATIVE = 1e-7;", "NEGATIVE = 0;",
          "test_hard_families.py"),
    Fault("compiled: no equilibration", "solvers/cpu/limits.hpp", "EQUILIBRATION_PASSES = 6", "EQUILIBRATION_PASSES = 0", "test_hard_families.py"),
    Fault("compiled: equilibration by the columns of Q", "solvers/cpu/scaled.hpp", "hessian_sizes(norm_);", "column_norms(norm_);",
          "test_hard_families.py"),
    Fault("compiled: the objective is not scaled", "solvers/cpu/scaled.hpp", "cost = power_of_four(1 / (curved_ ? largest : linear));",
          "cost = 1;", "test_hard_families.py"),
    Fault("compiled: centring waits for the gap", "solvers/cpu/general.hpp", "mu < AHEAD * found.infeasible", "mu < AHEAD * residual",
          "test_hard_families.py"),
    Fault("compiled: no start from far inside", "solvers/cpu/general.hpp", "once_more([&] { start_large(); });",
          "once_more([&] { start(1); });", "test_hard_families.py"),
    Fault("compiled: dependent equalities are not shifted", "solvers/cpu/saddle.hpp", "eq_delta_[r] = weight(s.eq[r]);",
          "eq_delta_[r] = 0 * weight(s.eq[r]);", "test_hard_families.py"),
    Fault("compiled: dependent rows are not shifted", "solvers/cpu/saddle.hpp", "row_delta_[r] = weight(s.row[r]);",
          "row_delta_[r] = 0 * weight(s.row[r]);", "test_adjoint.py"),
    Fault("compiled: singular Hessians are not shifted", "solvers/cpu/saddle.hpp", "RHO = 1e-9;", "RHO = 0;", "test_hard_families.py"),
    Fault("compiled: shifts hide small curvature", "solvers/cpu/saddle.hpp", "if (!first.positive || first.smallest < 1e2 * LITTLE) {", "{",
          "test_hard_families.py"),
    Fault("compiled: infeasibility is never proven", "solvers/cpu/certify.hpp", "return error * k.reach(v, 1) <= CLAIM;", "return error < 0;",
          "test_hard_families.py"),
    Fault("compiled: unboundedness is never proven", "solvers/cpu/certify.hpp", "if (!(fall > 0 && fall < INF)) return false;", "return false;",
          "test_hard_families.py"),
    Fault("compiled: unboundedness is looked for first", "solvers/cpu/certify.hpp", "        if (end == PROVEN_INFEASIBLE && proves",
          "        if (proves_unbounded(steepest_recession())) return DUAL_INFEASIBLE;\n        if (end == PROVEN_INFEASIBLE && proves",
          "test_hard_families.py"),
    Fault("compiled: no step below the tolerance", "solvers/cpu/general.hpp", "|| further == FURTHER", "|| further >= 0", "test_hard_families.py"),
    Fault("compiled: no polish", "solvers/cpu/limits.hpp", "FLIPS = 4", "FLIPS = 0", "test_hard_families.py"),
    Fault("compiled: held bounds are not shifted", "solvers/cpu/saddle.hpp", "bound_delta_[j] = weight(1 / s.dx[j]);",
          "bound_delta_[j] = 0;", "test_hard_families.py"),
    Fault("compiled: the polish changes no side", "solvers/cpu/limits.hpp", "FLIPS = 4", "FLIPS = 1",
          "solvers/test_cpu_hard.py test_hard_families.py"),
    Fault("compiled: held rows are not shifted", "solvers/cpu/saddle.hpp", "row_e[r] * (1 + row_e[r]) + finer_ * row_delta_[r];",
          "row_e[r] * (1 + row_e[r]);", "test_hard_families.py"),
    Fault("compiled: no row counts as dependent", "solvers/cpu/limits.hpp", "DEPENDENT = 1e-7", "DEPENDENT = 0", "test_hard_families.py"),
    Fault("compiled: rounding errors of Q do not go by its size", "solvers/cpu/general.hpp", "NEGATIVE * most", "NEGATIVE",
          "test_float32.py"),
    Fault("rounding errors of Q do not go by its size", "solvers/pdipm.py", "INDEFINITE * largest * torch", "INDEFINITE * torch",
          "test_float32.py"),
    Fault("compiled: rounding errors of Q's diagonal have a size", "solvers/cpu/scaled.hpp",
          "out[j] = std::max(dense() ? Q[j * np + j] : diagonal[j], 0.0);", "out[j] = std::fabs(dense() ? Q[j * np + j] : diagonal[j]);",
          "solvers/test_pdipm.py"),
    Fault("rounding errors of Q's diagonal have a size", "linalg/scaling.py", "Q.diagonal().clamp(min=0)", "Q.diagonal().abs()",
          "solvers/test_pdipm.py"),
    Fault("compiled: no second look at rows that seem dependent", "solvers/cpu/saddle.hpp",
          "if (factor(how, FINER) && dependent() == 0) return true;", "", "test_hard_families.py"),
    Fault("compiled: the second look believes rounding errors", "solvers/cpu/saddle.hpp", "FINE_DEPENDENT, FINE_NOISE * largest_", "0.0, 0.0",
          "test_hard_families.py"),
    Fault("compiled: close rows go unrefined", "solvers/cpu/limits.hpp", "CLOSE = 3e-5", "CLOSE = 0", "test_dependent.py"),
    Fault("compiled: one unknown for each of many rows", "solvers/cpu/executor.cpp", "<= 1.9 * static_cast<double>(batch.n)",
          "<= 1e9 * static_cast<double>(batch.n)", "test_hard_families.py"),
    Fault("compiled: the first point is never the last", "solvers/cpu/dual.hpp", "running & (close | (", "running & ((close & (steps > 0.0)) | (",
          "test_hard_families.py"),
    Fault("compiled: a single row is no block", "solvers/cpu/dense.hpp",
          "i += 2;\n    if (n - i == 1) f", "i += 2;\n    if (n - i == 1 && n > 1) f", "test_hard_families.py"),
    Fault("compiled: a diagonal is eliminated like any matrix", "solvers/cpu/general.hpp", "!problem.dense() && strictly_convex && !primal;",
          "!problem.dense() && strictly_convex && !primal && false;", "test_hard_families.py"),
    # (In lanes, and alone.)
    Fault("compiled: a scale may be infinite", "solvers/cpu/simd.hpp", "select((x > 0.0) & (x < INF), (Vec)bits, 1.0)", "(Vec)bits",
          "test_hard_families.py", (("solvers/cpu/simd.hpp", "return x > 0 && x < INF ? y : 1.0;", "return y;"),)),
    Fault("crossing bounds pass", "solvers/pdipm.py", "crossed = crossed | over.any(-1)", "crossed = crossed | over.any(-1) & bad", "test_hard_families.py"),
    Fault("NaN passes", "solvers/pdipm.py", "bad = bad | where", "bad = bad & where", "test_hard_families.py"),
    Fault("fixed variables are two bounds", "solvers/scaled_qp.py", "fixed = (low == high)", "fixed = (low > high)", "solvers/test_pdipm.py"),
    Fault("far sides count in full", "solvers/interior_point.py", "(qp.d.abs() / FAR).clamp_min(1).square()", "torch.ones_like(qp.d)",
          "test_hard_families.py"),
    Fault("no problem of least infeasibility", "solvers/pdipm.py", "if waiting.allowed() and waiting.some(open_):\n        # Before", "if False:\n        # Before",
          "test_hard_families.py"),
    Fault("shifts hide small curvature", "linalg/saddle.py", "singular = failed | (pivots(little).amin(-1) < 1e2 * LITTLE)", "singular = torch.ones_like(failed)",
          "test_hard_families.py"),
    Fault("no problem of steepest recession", "solvers/pdipm.py", "x = _auxiliary(certificates.steepest_recession(qp), qp.batch, open_).x", "x = outcome.state.x",
          "test_hard_families.py"),
    Fault("rounding errors prove something", "solvers/scaled_qp.py", "total > NOISE * terms.abs().sum(-1)", "total > 0", "test_hard_families.py"),
    Fault("indefinite Hessians pass", "solvers/pdipm.py", "group = group & ~_nonconvex(qp)", "pass", "test_hard_families.py"),
    Fault("no eigenvalue is a rounding error", "solvers/pdipm.py", "cholesky(Q + INDEFINITE * largest", "cholesky(Q + 0.0 * largest", "test_hard_families.py"),
    Fault("no equilibration", "linalg/scaling.py", "PASSES = 6", "PASSES = 0", "test_hard_families.py"),
    Fault("equilibration by the columns of Q", "linalg/scaling.py", "Q.diagonal().clamp(min=0), A.abs()", "Q.column_norms(), A.abs()", "test_hard_families.py"),
    Fault("the objective is not scaled", "linalg/scaling.py", "torch.where(curved, cost, power_of_two(1 / linear, step=2))", "torch.ones_like(cost)",
          "test_hard_families.py"),
    Fault("centring waits for the gap", "solvers/interior_point.py", "mu < AHEAD * infeasible", "mu < AHEAD * residual", "test_hard_families.py"),
    Fault("dependent rows are not shifted", "linalg/scaling.py", "return delta * torch.exp2(", "return 0.0 * torch.exp2(", "test_hard_families.py"),
    Fault("the polish changes no side", "solvers/polish.py", "ROUNDS = 4", "ROUNDS = 1", "test_hard_families.py"),
    Fault("held rows are not shifted", "linalg/saddle.py", "rows.row_e * (1 + rows.row_e) + system.shift.row, 1.0)",
          "rows.row_e * (1 + rows.row_e), 1.0)", "test_hard_families.py"),
    Fault("no row counts as dependent", "linalg/saddle.py", "floor: float = FLOOR", "floor: float = 0.0", "test_hard_families.py"),
    Fault("no second look at rows that seem dependent", "linalg/saddle.py", "if not waiting.some(unsure):", "if True:",
          "test_hard_families.py"),
    Fault("the second look believes rounding errors", "linalg/saddle.py", "FINE_FLOOR, FINE_NOISE, FINER = 1e-11, 1e-12", "FINE_FLOOR, FINE_NOISE, FINER = 0.0, 0.0",
          "test_hard_families.py"),
    Fault("one unknown for each of many rows", "solvers/pdipm.py", "WIDEST = 1.9", "WIDEST = 1e9", "test_hard_families.py"),
    Fault("there are always inequalities", "solvers/step.py", "    if not v.shape[-1]:\n        return v\n", "", "test_hard_families.py"),
    Fault("a diagonal is eliminated like any matrix", "solvers/pdipm.py", 'wanted = "diagonal" if structured else', 'wanted = "primal" if structured else',
          "test_hard_families.py"),
    Fault("a scale may be infinite", "linalg/scaling.py", "good = torch.isfinite(value) & (value > 0)", "good = value > 0", "test_hard_families.py"),
    Fault("compiled: no start that forgets the rows", "solvers/cpu/general.hpp", "once_more([&] { start(LIGHT); });", "", "test_hard_families.py"),
    Fault("compiled: a far side hides what others miss", "solvers/cpu/scaled.hpp", "value > d[r] ? largest(value, d[r]) : std::fabs(value)",
          "largest(value, d[r])", "test_hard_families.py", (("solvers/cpu/cone.hpp", "return select(value > side, vabs(side), Vec{});",
                                                              "return vabs(side);"),)),
    Fault("a far side hides what others miss", "solvers/scaled_qp.py", "torch.where(Cx > self.d, self.d, 0.0)", "self.d",
          "solvers/test_pdipm.py"),
    Fault("a far side hides what others miss, in the end", "kkt.py", "torch.where(violation > 0, h, 0.0)", "torch.where(there, h, 0.0)",
          "test_kkt.py"),
    Fault("a far bound hides what others miss, in the end", "kkt.py", "torch.where(errors[-1] > 0, bound, 0.0)",
          "torch.where(finite, bound, 0.0)", "test_kkt.py"),
    Fault("compiled: large solutions in small units", "solvers/cpu/limits.hpp", "LARGE = 1e6;", "LARGE = 1e300;", "test_hard_families.py"),
    Fault("large solutions in small units", "solvers/scaled_qp.py", "LARGE = 1e6", "LARGE = 1e300", "test_hard_families.py"),
    Fault("compiled: a large start in ordinary units", "solvers/cpu/certify.hpp", "x / (k.dx[j] * k.size)", "x / k.dx[j]", "laws/test_warm_start.py"),
    Fault("a large start in ordinary units", "solvers/warm.py", "x / (d * qp.size)", "x / d", "laws/test_warm_start.py"),
    Fault("a linear program for foreign solvers ends anywhere", "backends/units.py", "ahead.amin(0, keepdim=True) if len(ahead) else ahead",
          "ahead[:0]", "backends/test_reference_backends.py"),
    Fault("compiled: one row contradicts itself", "solvers/cpu/certify.hpp", "error * k.reach(v, 1) <= CLAIM", "error <= CLAIM",
          "test_fuzz.py", (("solvers/cpu/general.hpp", "pull * k.reach(now_, depth.value()) <= FARKAS", "pull <= FARKAS"),
                           ("solvers/cpu/limits.hpp", "LARGE = 1e6;", "LARGE = 1e300;"))),
    Fault("one row contradicts itself", "solvers/certificates.py", "(error * far <= TOLERANCE)", "(error <= TOLERANCE)",
          "test_hard_families.py", (("solvers/interior_point.py", "max_abs(pull) * qp.reach(state, depth)", "max_abs(pull)"),
                                    ("solvers/scaled_qp.py", "LARGE = 1e6", "LARGE = 1e300"))),
    Fault("compiled: a short step proves a fall for ever", "solvers/cpu/certify.hpp", "CLAIM * k.stride(v.x, 1)", "CLAIM", "test_fuzz.py",
          (("solvers/cpu/general.hpp", "FARKAS * k.stride(now_.x, fall.value())", "FARKAS * fall.value()"),
           ("solvers/cpu/limits.hpp", "LARGE = 1e6;", "LARGE = 1e300;"))),
    Fault("a short step proves a fall for ever", "solvers/certificates.py", "TOLERANCE * qp.stride(v, torch.ones_like(slope))", "TOLERANCE",
          "test_fuzz.py", (("solvers/interior_point.py", "FARKAS * qp.stride(state.x, slope)", "FARKAS * slope"),
                           ("solvers/scaled_qp.py", "LARGE = 1e6", "LARGE = 1e300"))),
    Fault("compiled: pivots believed", "solvers/cpu/certify.hpp", "!(error <= FLAT * length)", "true", "solvers/test_pdipm.py"),
    Fault("no start that forgets the rows", "solvers/pdipm.py", "for light in (False, True):", "for light in (False,):", "solvers/test_pdipm.py"),
    Fault("no start from far inside", "solvers/pdipm.py", "else interior_point.large_start(qp)",
          "else interior_point.start(qp, primal, hold=True)", "test_hard_families.py"),
    Fault("pivots believed", "solvers/certificates.py", "run = run & (~convex | (bend <= FLAT * max_abs(v)))", "run = run & ~convex",
          "solvers/test_pdipm.py"),
    Fault("compiled: an adjoint system without a solution unseen", "solvers/cpu/pullback.hpp", "work.poor += !pull", "work.poor += 0 * !pull",
          "test_adjoint.py"),
    Fault("compiled: nor where rows depend", "solvers/cpu/saddle.hpp", "length > 0 ? lost / length : 0.0", "0 * length", "test_adjoint.py"),
    Fault("an adjoint system without a solution unseen", "active_system.py", "poor := int(((residual > ADJOINT)", "poor := 0 * int(((residual > ADJOINT)",
          "test_adjoint.py"),
    Fault("nor where rows depend", "linalg/saddle.py", "torch.maximum(residual, lost)", "residual", "test_adjoint.py"),
    Fault("no NaN at dependent rows on request", "implicit.py", "failed | (counts[1:] > 0).any(0)", "failed | (counts[1:2] > 0).any(0)",
          "test_adjoint.py"),
    Fault("eigenvalue of another instance", "failures.py", "[tuple(index)].double())", "[(0,) * len(index)].double())", "solvers/test_pdipm.py"),
    Fault("solutions of another Qx", "selected.py", "torch.where(mask, form.Q.matvec(at), 0.0)", "torch.where(mask, 0.9 * form.Q.matvec(at), 0.0)",
          "test_selected.py"),
    Fault("the set of solutions does not move with Qx", "selected.py", "form.Q.matvec(at), 0.0)", "form.Q.matvec(at).detach(), 0.0)", "test_selected.py"),
    Fault("constraints with multipliers not held", "selected.py", "rows = torch.where(held.row.unsqueeze(-1), form.G, 0.0)",
          "rows = torch.where(held.row.unsqueeze(-1), 0.0, 0.0 * form.G)", "test_selected.py"),
    Fault("a centre that is none", "selected.py", "torch.where(second.ok, status, int(Status.NUMERICAL_ERROR))", "status", "test_selected.py"),
    Fault("kink rule ignored", "active_system.py", 'weak_any = kink_rule not in ("inactive", "nan") and', "weak_any = False and", GRADIENTS),
    Fault("weakly active rows held", "kkt.py", "there & (dual > slack) & ~weak, weak", "there & (dual >= slack), weak", GRADIENTS),
    Fault("certificate not checked", "solvers/certificates.py",
          "holds = run & (depth > 0) & torch.isfinite(depth) & (error * far <= TOLERANCE)", "holds = run", "solvers/test_pdipm.py"),
    Fault("finished instances go on", "solvers/interior_point.py", "state = moved.where(~stopped, state)", "state = moved",
          "solvers/test_pdipm.py laws/test_batch_equals_loop.py"),
    Fault("no guard against cycling", "solvers/interior_point.py", "(slow >= 2) & (reach < 0.9), 0.9, eta",
          "(slow >= 2) & (reach < 0.9), eta, eta", "solvers/test_pdipm.py"),
    Fault("fixed variable follows one side only", "kkt.py", "torch.where(active.fixed, 0.5 * (lower + upper), held)",
          "torch.where(active.fixed, lower, held)", GRADIENTS),
    Fault("dependent rows: no minimum norm", "linalg/saddle.py", "            u = u.minus(part)", "            pass", "linalg/test_saddle.py"),
    Fault("dependent rows: inconsistent part kept", "linalg/saddle.py", "            r = r.minus(part)", "            pass", "linalg/test_saddle.py"),
    Fault("polish without refinement", "linalg/saddle.py", "for _ in range(most):", "for _ in range(0):", "linalg solvers"),
    Fault("value without the equality term", "optimal_value.py", "total = form.objective(x) + (nu * form.equalities(x)).sum(-1)",
          "total = form.objective(x)", "laws/test_envelope.py"),
    Fault("slack detached", "implicit.py", "values.s + slack,", "values.s + slack.detach(),", GRADIENTS),
    Fault("objective scale forgotten in duals", "solvers/pdipm.py", "rows * general / cost", "rows * general", "solvers"),
    Fault("active set in original units", "kkt.py", "read(point.s * rows, point.lam * cost / rows)", "read(point.s, point.lam)", "test_kkt.py"),
    Fault("first derivatives of the value solve and differ", "gates.py", "return grad if torch.is_grad_enabled() else None",
          "return 2 * grad", GRADIENTS),
    Fault("weakly active rows not counted", "implicit.py", "torch.where(failed, 0, active.weak_count())", "torch.where(failed, 0, 0 * active.weak_count())",
          GRADIENTS),
    Fault("a mapped dimension among the right-hand sides", "active_solve.py", "place = all_of_r - own if is_own else 0", "place = 0",
          "test_transforms.py"),
    Fault("forward mode unseen by another", "transforms.py", "_set_fwd_grad_enabled(True)", "_set_fwd_grad_enabled(False)",
          GRADIENTS),
    Fault("data computed from data counted twice", "gates.py",
          "return {name: tensor.view_as(tensor) for name, tensor in tensors.items()}", "return tensors", GRADIENTS),
    Fault("tangents of upper bounds taken for those of lower ones", "transformed.py", 'tangents.get("lower"), tangents.get("upper")',
          'tangents.get("upper"), tangents.get("lower")', "test_transformed.py"),
    Fault("compiled: inverse without what the held rows take away", "solvers/cpu/inverse.hpp", "gram<Single, true>(S, ldn, count, n, XX",
          "gram<Single, true>(S, ldn, 0, n, XX", "test_transformed.py"),
    Fault("compiled: sign of multipliers by multipliers", "solvers/cpu/inverse.hpp", "by_y = -in / f.cost", "by_y = in / f.cost",
          "test_transformed.py"),
    Fault("compiled: a slack taken for an unknown", "solvers/cpu/inverse.hpp", "look(g.gs, g.m, Entry::SEVERAL, 0);",
          "look(g.gs, g.m, Entry::NONE, 0);", "test_transformed.py"),
    Fault("vectors of what is packed in another order", "transformed.py", "arrangement.piece(rest, which) for which in range(5)",
          "arrangement.piece(rest, (which + 4) % 5) for which in range(5)", "test_transformed.py"),
    Fault("a slack without the tangent of x", "transformed.py", "layers.covered(safe) + attached[at]", "layers.covered(safe)",
          "test_transformed.py"),
    Fault("a derivative of a derivative goes past the transforms", "transforms.py", "return tensor.requires_grad or", "return",
          "test_transformed.py"),
    Fault("shared data summed over what vmap maps", "transformed.py", "keep, batch = 1 + len(task.layers.mapped)", "keep, batch = 1",
          "test_transformed.py"),
    Fault("compiled value without its gradient", "operators.py", "return [g.contiguous() for g, need in zip(found, needed, strict=True) if need]",
          "return [0 * g for g, need in zip(found, needed, strict=True) if need]", "test_operators.py"),
    Fault("auto takes the lowest priority", "backends/registry.py", "key=lambda name: -_all()", "key=lambda name: _all()", "test_solution.py"),
    Fault("given values may replace learned ones", "problems/base.py", 'if kind != "given":', 'if kind == "none":', "test_layer.py"),
    Fault("saved tensors read twice", "pulled.py", "x, rest, *data = ctx.saved_tensors", "x, rest, *data = ctx.saved_tensors and ctx.saved_tensors",
          "test_training.py"),
    Fault("autocast reaches the solve", "layer.py", "with full_precision():", "if True:", "test_modules.py"),
    Fault("value from changed data", "optimal_value.py", "if tensor._version != version or freed:", "if False:", "test_solution.py"),
    # The warm start.
    Fault("failed instances of a start used", "warm_start.py", "x = torch.where(ok.unsqueeze(-1), x, torch.nan)", "pass",
          "laws/test_warm_start.py"),
    Fault("what was found near a start is accepted wherever it ended", "solvers/pdipm.py",
          "served = rest & (outcome.residual <= tolerance)", "served = rest", "laws/test_warm_start.py"),
    Fault("the factor of another active set after a start", "solvers/pdipm.py",
          "second._replace(active=active, factor=saddle.factor_active(active_rows(qp, active)))",
          "second._replace(active=active)", "laws/test_warm_start.py"),
    Fault("compiled: any active set of a start is right", "solvers/cpu/general.hpp", "if (with_polish && polish(tolerance, WARM_FLIPS))",
          "if (with_polish && polish(INF, WARM_FLIPS))", "laws/test_warm_start.py"),
    Fault("compiled: what was found near a start is accepted wherever it ended", "solvers/cpu/general.hpp",
          "with_polish, diagonal) == CONVERGED;\n    }", "with_polish, diagonal) != BROKEN;\n    }", "laws/test_warm_start.py"),
    Fault("compiled: the first start for all lanes", "solvers/cpu/dual.hpp",
          "const T* source = static_cast<const T*>(from) + i * size;\n                for",
          "const T* source = static_cast<const T*>(from) + first_ * size;\n                for", "laws/test_warm_start.py"),
    # Other problems, solved instead; foreign solvers; the checker.
    Fault("shifts below the tolerance are none", "closest.py", "clamp(min(LEAST, tolerance), tolerance)", "clamp(tolerance, tolerance)",
          "test_infeasible.py"),
    Fault("soft constraints are believed to hold", "elastic.py", "met = met & (dual < weight).all(-1)", "pass", "test_elastic.py"),
    Fault("weights of what holds have no gradient", "elastic.py", "x=first.x + tie", "x=first.x", "test_elastic.py"),
    Fault("softened with a batch of other size", "elastic.py", 'first.executor.startswith(("torch", "cuda"))', "False",
          "test_elastic.py"),
    Fault("negative weights pass", "elastic.py", "wrong = transforms.plain(weight) <= 0", "wrong = transforms.plain(weight) < -1e300",
          "test_infeasible.py"),
    Fault("a ray upwards", "backends/base.py", "V.mT @ q / scale", "-V.mT @ q / scale", "backends/test_reference_backends.py"),
    Fault("a ray is not checked", "backends/base.py", "if not (worst <= accuracy * size and fall", "if not (size >= 0 and fall",
          "backends/test_reference_backends.py backends/test_base.py"),
    Fault("large solutions for foreign solvers in small units", "backends/units.py", "LARGE = 1e6", "LARGE = 1e300",
          "backends/test_reference_backends.py"),
    Fault("a solver's word for a fall for ever", "backends/cvxpy_.py", "return InstancePoint(Status.NUMERICAL_ERROR, iterations=iterations)\n        return",
          "return InstancePoint(status, iterations=iterations)\n        return", "backends/test_reference_backends.py"),
    Fault("what a backend returns is believed", "backends/base.py", "_check_raw(self.name or type(self).__name__, raw, form, settings)", "pass",
          "backends/test_base.py"),
    Fault("the checker takes the hard problem", "check/gradients.py", "policy = None if layer is None else layer.on_infeasible", "policy = None",
          "check/test_gradients.py"),
    Fault("the checker forgives what is small", "check/gradients.py", "torch.maximum(sizes, self.noise / self.tolerance)", "(1 + sizes)",
          "check/test_gradients.py"),
    Fault("a look at the values without waiting", "waiting.py", "return not allowed() or bool(mask.any())", "return bool(mask.any())", "test_waiting.py"),
    Fault("a reverse pass that waits", "active_system.py", "with waiting.allow(self.sync):", "if True:", "test_waiting.py"),
    Fault("refined as long as a neighbour is", "linalg/saddle.py", "better = (worse < error) & ~settled", "better = worse < error", "linalg/test_saddle.py"),
    Fault("gradients by the elimination that a neighbour needs", "solvers/pdipm.py", 'Mixed(others, saddles["primal"], first)',
          'saddles["primal"]', "laws/test_batch_equals_loop.py"),
    Fault("central weights settle when the neighbours' do", "linalg/central.py", "torch.where(done, 0.0, alpha)", "alpha",
          "laws/test_batch_equals_loop.py"),
    Fault("minimum norm because of a neighbour's kinks", "active_system.py", "self._solve_dense(clean, transpose).where(dense, u)",
          "self._solve_dense(clean, transpose)", "laws/test_batch_equals_loop.py"),
    Fault("no step below the tolerance", "solvers/pdipm.py", "unsure = close & ~done.accepted", "unsure = close & done.accepted & ~done.accepted",
          "test_hard_families.py"),
    Fault("interruptions leave the host waiting", "waiting.py", "    finally:\n        _here.allowed = before", "    except ValueError:\n        _here.allowed = before",
          "solvers/test_pdipm.py"),
    Fault("CUDA: a failed instance with a zero gradient", "solvers/cuda/pullback.cuh", "!task.others && asked", "task.others && asked", "test_waiting.py"),
    Fault("a damaged kernel is run", "solvers/code_cache.py", "if code and hashlib.sha256(code).digest() == kept[:_DIGEST]:", "if code:",
          "solvers/test_code_cache.py"),
    Fault("another compiler's kernel is run", "solvers/cuda_executor.py", "said = [_compiler_version(), architecture,", "said = [architecture,",
          "solvers/test_code_cache.py"),
    Fault("CUDA: float32 judged before its rounding", "solvers/cuda/interior_point.cuh", " && claim(work)", "", "solvers/test_cuda_executor.py"),
    Fault("CUDA: gradients of what others solved, for all", "pulled.py", "torch.where(mine.unsqueeze(-1), g.reshape(count, g.shape[-1])[begin:end], 0.0)",
          "g.reshape(count, g.shape[-1])[begin:end]", "solvers/test_cuda_executor.py"),
]  # fmt: skip


def main(words: list[str]) -> int:
    """Plant the faults whose names contain one of these words; without words, all."""
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    survived: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        ignore = shutil.ignore_patterns(
            ".venv*", ".git", "build", "output", "site", "__pycache__", ".hypothesis", ".*_cache"
        )
        shutil.copytree(ROOT, copy, ignore=ignore)
        compile_quickly(copy)
        faulty_library = True
        for fault in faults:
            changes = ((fault.file, fault.old, fault.new), *fault.also)
            originals = {file: (copy / "diffopt" / file).read_text() for file, _, _ in changes}
            stale = plant(changes, copy)
            if stale:
                print(f"STALE     {fault.name}: text not found in {stale}")
                restore(originals, copy)
                survived.append(fault.name)
                continue
            compiled = any(file.endswith((".hpp", ".cpp")) for file in originals)
            if compiled or faulty_library:
                subprocess.run(["make", "cpu"], cwd=copy, check=True, capture_output=True)
            faulty_library = compiled
            start = time.perf_counter()
            caught, missed = run_tests(fault, copy)
            restore(originals, copy)
            word = "caught" if caught and not missed else "SURVIVED"
            by = f"{caught[0]} and {len(caught) - 1} more" if caught else "nothing"
            but = f", not by {', '.join(missed)}" if missed else ""
            print(f"{word:9} {fault.name}: {by}{but} ({time.perf_counter() - start:.0f} s)", flush=True)
            if word != "caught":
                survived.append(fault.name)
    print(f"{len(faults) - len(survived)} of {len(faults)} faults caught")
    for name in survived:
        print(f"not caught: {name}")
    return 1 if survived else 0


def plant(changes: tuple[tuple[str, str, str], ...], tree: Path) -> str | None:
    """Make these replacements, (file, old, new) each; return the first file that has not the text, if there is one."""
    for file, old, new in changes:
        path = tree / "diffopt" / file
        text = path.read_text()
        if old not in text:
            return file
        path.write_text(text.replace(old, new))
    return None


def restore(originals: dict[str, str], tree: Path) -> None:
    for file, text in originals.items():
        (tree / "diffopt" / file).write_text(text)


def compile_quickly(tree: Path) -> None:
    """Let a tree compile one variant, the one that runs everywhere, without optimisation."""
    variants = tree / "diffopt/solvers/cpu/variants.txt"
    common = next(line for line in variants.read_text().splitlines() if line.startswith("all "))
    variants.write_text(f"{common} -O0\nbaseline\n")


def run_tests(fault: Fault, tree: Path) -> tuple[list[str], list[str]]:
    """Return the tests that fail, at least one of them, and the families named by the fault that nothing noticed."""
    families = [family.name for family in FAMILIES if fault.name in family.faults]
    tests = [f"tests/{name}" for name in fault.tests.split()]
    # (Families: all, of one executor. Otherwise one is enough.)
    options = ["-k", "cpu-" if fault.name.startswith("compiled: ") else "torch-"] if families else ["-x"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *options, *tests]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    caught = [line.split(" - ")[0].split(" ", 1)[1] for line in lines] if done.returncode == 1 else []
    seen = {found[1] for name in caught if (found := re.search(r"\[(?:cpu|torch)-(.+?)(?:-\d{6,})?\]$", name))}
    return caught, [name for name in families if name not in seen]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
