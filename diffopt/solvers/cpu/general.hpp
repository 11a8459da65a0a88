// The interior-point method for one problem of any structure, with the full optimality conditions: singular Hessians,
// dependent equalities, fixed variables, problems without solutions. As diffopt.solvers.interior_point and .polish; see
// there for the choices. The dual form (dual.hpp) is faster where it applies.
#pragma once
#include "cone.hpp"
#include "saddle.hpp"

namespace diffopt {

// Where the iteration ended. `proven`: the state holds a direction that proves what it says.
enum Ending { AT_LIMIT, STUCK, BROKEN, CONVERGED, PROVEN_INFEASIBLE, PROVEN_UNBOUNDED, NOT_CONVEX };

constexpr double WORTH_POLISHING = 1e-2;  // relative residual up to which an end point is tried for its active set
constexpr double FARKAS = 1e-9;           // relative error of a certificate at which an iterate proves something
constexpr double NOISE = 1e-12;           // share of its terms up to which a sum is taken for rounding error
constexpr double NEGATIVE = 1e-7;         // eigenvalue below minus this: the Hessian is indefinite (diffopt.solution.INDEFINITE)

// What a certificate is normalised by: minus a sum of products; 0 where that is a rise, or rounding error, which proves
// nothing.
struct Fall {
    double sum = 0, size = 0;
    void take(double product) { sum -= product, size += std::fabs(product); }
    double value() const { return sum > NOISE * size ? sum : 0.0; }
};

class General {
  public:
    using P = Single;
    Scaled problem;
    Saddle saddle;
    State state;           // the best point
    Errors errors;         // of it
    double* active;        // rows of C that are held at it, where it is polished; else those with z > s
    int64_t iterations = 0;
    bool strictly_convex = false;

    explicit General(const Sizes& sizes) : problem(sizes), saddle(problem) {}

    void plan(Arena& arena) {
        problem.plan(arena);
        saddle.plan(arena);
        for (State* v : {&state, &now_, &step_, &trial_}) *v = problem.take_state(arena);
        for (double** v : {&active, &above_, &flipped_, &held_, &far_, &ratio_, &tau_, &side_, &r_row_, &Cx_, &Cdx_})
            *v = arena.take(problem.rows);
        for (double** v : {&r_dual_, &Qx_}) *v = arena.take(problem.np);
        for (double** v : {&r_eq_, &Ax_}) *v = arena.take(problem.pp);
        for (double** v : {&right_, &u_}) *v = arena.take(saddle.size);
        factor_ = problem.dense() ? arena.take(problem.k.n * problem.np) : nullptr;
        inverse_ = arena.take(problem.np);
    }

    // Solves the problem as it stands in `problem`, scaled. `primal`: do not rely on a definite Hessian. `near`: an earlier
    // solution to begin with, or null.
    Ending solve(double tolerance, int64_t max_iterations, bool with_polish, bool primal, const State* near = nullptr) {
        errors = Errors{};
        iterations = 0;
        held_last_ = false;
        strictly_convex = problem.strictly_convex(factor_, inverse_);
        const bool diagonal = !problem.dense() && strictly_convex && !primal;
        step_kind_ = diagonal ? DIAGONAL_FIRST : WEIGHED;
        final_kind_ = diagonal ? DIAGONAL_FIRST : HELD;
        saddle.set_shift(diagonal);
        if (!strictly_convex && !convex()) {
            start();
            problem.copy(state, now_);
            return NOT_CONVEX;
        }
        int64_t in_vain = 0;
        if (near) {
            if (solve_near(*near, tolerance, max_iterations, with_polish, diagonal)) return CONVERGED;
            in_vain = iterations;
            errors = Errors{};
            iterations = 0;
            step_kind_ = diagonal ? DIAGONAL_FIRST : WEIGHED;
        }
        const Ending end = solve_cold(tolerance, max_iterations, with_polish, diagonal);
        iterations += in_vain;
        return end;
    }

    bool diagonal() const { return final_kind_ == DIAGONAL_FIRST; }

    // Rows z > s of a state.
    void mark_active(const State& v, double* marks) const {
        for (Index r = 0; r < problem.rows; r++) marks[r] = problem.on[r] != 0 && v.z[r] > v.s[r];
    }

    // Factors the system of a final active set, unless that is what was factored last.
    bool hold(const double* marks) {
        const Scaled& k = problem;
        if (held_last_ && std::equal(marks, marks + k.rows, held_)) return saddle.sound;
        held_last_ = true;
        std::copy_n(marks, k.rows, held_);
        const double soft = k.soft;
        for (Index r = 0; r < k.mp; r++) saddle.row_in[r] = marks[r], saddle.row_e[r] = soft;
        if (k.k.bounded())
            for (Index j = 0; j < k.np; j++) {
                saddle.bound_in[j] = k.fixed[j] != 0 || (k.k.lower && marks[k.lower_at + j] != 0) ||
                                     (k.k.upper && marks[k.upper_at + j] != 0);
                saddle.bound_e[j] = 0;
            }
        return soft != 0 ? saddle.factor(WEIGHED) : saddle.factor_active(final_kind_);
    }

  private:
    Elimination step_kind_ = WEIGHED, final_kind_ = HELD;
    State now_, step_, trial_;
    bool held_last_ = false;  // the system of the rows in held_ was factored last
    double *above_, *flipped_, *held_, *far_, *ratio_, *tau_, *side_, *r_row_, *Cx_, *Cdx_, *r_dual_, *Qx_, *r_eq_, *Ax_;
    double *right_, *u_, *factor_, *inverse_;

    bool there(Index r) const { return problem.on[r] != 0; }

    Ending solve_cold(double tolerance, int64_t max_iterations, bool with_polish, bool diagonal) {
        start();
        problem.copy(state, now_);
        const bool again = problem.soft == 0;
        may_hold_ = again && !diagonal;
        last_ = !again;
        Ending end = iterate(tolerance, max_iterations, with_polish, diagonal);
        if (errors.worst <= tolerance) end = CONVERGED;
        auto once_more = [&](auto begin) {
            if (!again || (end != STUCK && end != BROKEN) || iterations >= max_iterations) return;
            begin();
            const Ending found = iterate(tolerance, max_iterations, with_polish, diagonal);
            if (found != BROKEN) end = found;
            if (errors.worst <= tolerance) end = CONVERGED;
        };
        // From two other starts, holding every row throughout.
        if (!diagonal) step_kind_ = HELD;
        may_hold_ = false;
        once_more([&] { start_large(); });
        last_ = true;
        once_more([&] { start(LIGHT); });
        if (end != CONVERGED && end != PROVEN_INFEASIBLE && with_polish && errors.worst <= WORTH_POLISHING) {
            // An active set can be right long before the point is; whether it is, the polish finds out.
            problem.copy(now_, state);
            mark_active(now_, above_);
            polish(errors.worst);
            if (errors.worst <= tolerance) end = CONVERGED;
        }
        return end;
    }

    // Tries the active set of an earlier solution, then the method from near it.
    bool solve_near(const State& near, double tolerance, int64_t max_iterations, bool with_polish, bool diagonal) {
        Scaled& k = problem;
        for (Index r = 0; r < k.rows; r++) above_[r] = near.z[r] > HELD_FROM;
        problem.copy(now_, near);
        if (with_polish && polish(tolerance, WARM_FLIPS)) return true;
        // How far it is from a solution: of each row the smaller of multiplier and slack should be zero.
        residuals_now();
        double worst = SMALLEST_ERROR;
        for (Index j = 0; j < k.np; j++) worst = vmax_nan(std::fabs(r_dual_[j]), worst);
        for (Index r = 0; r < k.pp; r++) worst = vmax_nan(std::fabs(r_eq_[r]), worst);
        for (Index r = 0; r < k.rows; r++) {
            now_.s[r] = k.d[r] - Cx_[r];
            if (there(r)) worst = vmax_nan(std::fabs(std::min(now_.s[r], now_.z[r])), worst);
        }
        if (!(worst <= LARGEST_ERROR)) return false;
        // Near it, where s z is at least so much in every row.
        const double root = std::sqrt(worst);
        for (Index r = 0; r < k.rows; r++) {
            double &s = now_.s[r], &z = now_.z[r];
            const double slack = std::max(s, 0.0), multiplier = z;
            if (multiplier > slack) z = std::max(multiplier, root), s = std::max(slack, worst / z);
            else s = std::max(slack, root), z = std::max(multiplier, worst / s);
            if (!there(r)) s = 1, z = 0;
        }
        problem.copy(state, now_);
        may_hold_ = last_ = false;
        return iterate(tolerance, std::min(WARM_STEPS, max_iterations), with_polish, diagonal) == CONVERGED;
    }

    // Whether the Hessian, in equilibrated units, has no eigenvalue clearly below zero.
    bool convex() {
        if (!problem.dense()) {
            // diag(d) + FF' with some d <= 0: factor it whole.
            bool nonnegative = true;
            for (Index j = 0; j < problem.k.n; j++) nonnegative = nonnegative && problem.diagonal[j] >= -NEGATIVE;
            if (nonnegative || !problem.k.rank) return nonnegative;
            return saddle.hessian_is_definite(NEGATIVE);
        }
        // Largest sum of magnitudes in a row: at least the largest eigenvalue, and rounding errs by less than eps of it.
        double most = 1;
        for (Index i = 0; i < problem.k.n; i++) {
            double sum = 0;
            for (Index j = 0; j < problem.k.n; j++) sum += std::fabs(problem.Q[i * problem.np + j]);
            most = std::max(most, sum);
        }
        std::fill_n(r_dual_, problem.np, NEGATIVE * most);
        return cholesky<P>(problem.Q, problem.np, r_dual_, factor_, problem.np, problem.k.n, inverse_).positive;
    }

    void factor_step(const double* ratio) {
        const Scaled& k = problem;
        held_last_ = false;
        for (Index r = 0; r < k.mp; r++) saddle.row_in[r] = k.on[r], saddle.row_e[r] = ratio[r] + k.soft;
        if (k.k.bounded())
            for (Index j = 0; j < k.np; j++) {
                const Index l = k.lower_at + j, u = k.upper_at + j;
                double weight = 0;
                if (k.k.lower && there(l)) weight += 1 / ratio[l];
                if (k.k.upper && there(u)) weight += 1 / ratio[u];
                const bool held = k.fixed[j] != 0;
                saddle.bound_in[j] = held || weight > 0;
                saddle.bound_e[j] = held || !(weight > 0) ? 0.0 : 1 / weight;
            }
        saddle.factor(step_kind_);
    }

    // The direction for residuals (r_dual_, r_eq_, r_row_) at `v`, and  s ds + z dz = tau_ - s z.
    void direction(const State& v, int refinements) {
        const Scaled& k = problem;
        const Index n = k.k.n;
        for (Index r = 0; r < k.rows; r++) side_[r] = there(r) ? -r_row_[r] + v.s[r] - tau_[r] / v.z[r] : 0.0;
        for (Index j = 0; j < k.np; j++) right_[j] = -r_dual_[j];
        for (Index r = 0; r < k.pp; r++) right_[saddle.at_eq + r] = -r_eq_[r];
        for (Index r = 0; r < k.mp; r++) right_[saddle.at_row + r] = side_[r];
        if (k.k.bounded())
            for (Index j = 0; j < n; j++) {
                // Two bounds of one variable: w_u (dx - side_u) - w_l (-dx - side_l) = (w_l + w_u)(dx - bound).
                const Index l = k.lower_at + j, u = k.upper_at + j;
                double sum = 0;
                if (k.k.lower && there(l)) sum -= side_[l] / ratio_[l];
                if (k.k.upper && there(u)) sum += side_[u] / ratio_[u];
                right_[saddle.at_bound + j] = k.fixed[j] != 0 ? k.target[j] - v.x[j] : sum * saddle.bound_e[j];
            }
        saddle.solve(right_, u_, refinements);
        std::copy_n(u_, k.np, step_.x);
        std::copy_n(u_ + saddle.at_eq, k.pp, step_.nu);
        for (Index r = 0; r < k.mp; r++) step_.z[r] = there(r) ? u_[saddle.at_row + r] : 0.0;
        for (Index j = 0; k.k.bounded() && j < k.np; j++) {
            const Index l = k.lower_at + j, u = k.upper_at + j;
            const double all = u_[saddle.at_bound + j], force = k.fixed[j] != 0 ? 0.0 : all;
            step_.y[j] = k.fixed[j] != 0 ? all : 0.0;
            if (k.k.lower && k.k.upper) {
                // The bound of smaller weight is computed directly, the other takes the rest of the force.
                const double direct_l = there(l) ? (-u_[j] - side_[l]) / ratio_[l] : 0.0;
                const double direct_u = there(u) ? (u_[j] - side_[u]) / ratio_[u] : 0.0;
                const bool light_l = there(u) && (!there(l) || ratio_[l] >= ratio_[u]);
                step_.z[l] = there(l) ? (light_l ? direct_l : direct_u - force) : 0.0;
                step_.z[u] = there(u) ? (light_l ? force + direct_l : direct_u) : 0.0;
            } else if (k.k.lower) {
                step_.z[l] = there(l) ? -force : 0.0;
            } else {
                step_.z[u] = there(u) ? force : 0.0;
            }
        }
        k.times_C(step_.x, Cdx_);
        for (Index r = 0; r < k.rows; r++) {
            if (!there(r)) {
                step_.s[r] = 0;
                continue;
            }
            // Where s is small its change is taken from complementarity, elsewhere from feasibility.
            const double dz = step_.z[r], by_complementarity = -v.s[r] + tau_[r] / v.z[r] - ratio_[r] * dz;
            const double soft = r < k.mp ? k.soft * dz : 0.0;
            step_.s[r] = v.s[r] < v.z[r] ? by_complementarity : -r_row_[r] - (Cdx_[r] - soft);
        }
    }

    // The minimiser of the objective plus weight/2 |Cx - d|^2 / far, and s and z from its distances, into now_.
    void start(double weight = 1) {
        const Scaled& k = problem;
        for (Index r = 0; r < k.rows; r++) far_[r] = far_weight(k.d[r]) / weight;
        std::fill_n(now_.x, k.np, 0.0), std::fill_n(now_.nu, k.pp, 0.0), std::fill_n(now_.y, k.np, 0.0);
        for (Index r = 0; r < k.rows; r++) {
            now_.s[r] = far_[r], now_.z[r] = 1, ratio_[r] = far_[r], tau_[r] = far_[r];
            r_row_[r] = -k.d[r];
        }
        std::copy_n(k.q, k.np, r_dual_);
        for (Index r = 0; r < k.pp; r++) r_eq_[r] = -k.b[r];
        factor_step(ratio_);
        bool usable = saddle.sound;
        if (usable) {
            direction(now_, 1);
            k.times_C(step_.x, Cx_);
            double low_s = INF, low_z = INF, high_s = 0, high_z = 0;
            for (Index r = 0; r < k.rows; r++) {
                if (!there(r)) continue;
                const double s = k.d[r] - Cx_[r], z = step_.z[r];
                low_s = vmin(s, low_s), high_s = vmax(std::fabs(s), high_s);
                low_z = vmin(z, low_z), high_z = vmax(std::fabs(z), high_z);
                usable = usable && std::isfinite(s) && std::isfinite(z);
            }
            for (Index j = 0; j < k.k.n; j++) usable = usable && std::isfinite(step_.x[j]);
            if (usable) {
                const double shift_s = interior_shift<double>(low_s, high_s), shift_z = interior_shift<double>(low_z, high_z);
                for (Index r = 0; r < k.rows; r++) {
                    if (!there(r)) continue;
                    now_.s[r] = k.d[r] - Cx_[r] + shift_s;
                    now_.z[r] = far_multiplier(now_.s[r], step_.z[r] + shift_z);
                }
                std::copy_n(step_.x, k.np, now_.x), std::copy_n(step_.nu, k.pp, now_.nu), std::copy_n(step_.y, k.np, now_.y);
            }
        }
        for (Index r = 0; r < k.rows; r++) {
            if (!usable) now_.s[r] = now_.z[r] = 1;
            if (!there(r)) now_.s[r] = 1, now_.z[r] = 0;
        }
        std::fill_n(above_, k.rows, 0.0);
    }

    // Far inside the cone: x = 0, and s and z ten times as large as anything in the data but far sides. (A slack that has to
    // grow by a factor makes Newton's step lower its multiplier by the same, which blocks it where the solution has both
    // large, as where soft constraints have a high price. From above there is no such growth.)
    void start_large() {
        const Scaled& k = problem;
        double size = 1;
        for (Index j = 0; j < k.np; j++) size = vmax(std::fabs(k.q[j]), vmax(std::fabs(k.target[j]), size));
        for (Index r = 0; r < k.pp; r++) size = vmax(std::fabs(k.b[r]), size);
        for (Index r = 0; r < k.rows; r++)
            if (there(r) && std::fabs(k.d[r]) <= FAR) size = vmax(std::fabs(k.d[r]), size);
        std::fill_n(now_.x, k.np, 0.0), std::fill_n(now_.nu, k.pp, 0.0), std::fill_n(now_.y, k.np, 0.0);
        for (Index r = 0; r < k.rows; r++) now_.s[r] = there(r) ? 10 * size : 1, now_.z[r] = there(r) ? 10 * size : 0;
        std::fill_n(above_, k.rows, 0.0);
    }

    // Fills Qx_, r_dual_, Ax_, r_eq_, Cx_, r_row_ at now_.
    void residuals_now() {
        Scaled& k = problem;
        k.times_Q(now_.x, Qx_);
        for (Index j = 0; j < k.np; j++) r_dual_[j] = Qx_[j] + k.q[j];
        k.add_pull(now_.nu, r_dual_);
        k.add_push(now_.z, now_.y, r_dual_);
        k.times_A(now_.x, Ax_);
        for (Index r = 0; r < k.pp; r++) r_eq_[r] = Ax_[r] - k.soft * now_.nu[r] - k.b[r];
        k.times_C(now_.x, Cx_);
        for (Index r = 0; r < k.rows; r++)
            r_row_[r] = there(r) ? Cx_[r] - (r < k.mp ? k.soft * now_.z[r] : 0.0) + now_.s[r] - k.d[r] : 0.0;
    }

    // Whether now_ proves that there is no solution; uses what residuals_now computed.
    Ending proof(bool bounded) const {
        const Scaled& k = problem;
        Fall depth, fall;
        double pull = 0, error = 0;
        for (Index r = 0; r < k.k.p; r++) depth.take(k.b[r] * now_.nu[r]), error = vmax_nan(std::fabs(Ax_[r]), error);
        for (Index r = 0; r < k.rows; r++) {
            if (!there(r)) continue;
            depth.take(k.d[r] * now_.z[r]);
            error = vmax_nan(Cx_[r], error);
        }
        for (Index j = 0; j < k.k.n; j++) {
            depth.take(k.target[j] * now_.y[j]);
            pull = vmax_nan(std::fabs(r_dual_[j] - Qx_[j] - k.q[j]), pull);
            fall.take(k.q[j] * now_.x[j]);
            error = vmax_nan(std::fabs(Qx_[j]), error);
            if (k.fixed[j] != 0) error = vmax_nan(std::fabs(now_.x[j]), error);
        }
        if (depth.value() > 0 && pull * k.reach(now_, depth.value()) <= FARKAS * depth.value()) return PROVEN_INFEASIBLE;
        if (!bounded && fall.value() > 0 && error <= FARKAS * k.stride(now_.x, fall.value())) return PROVEN_UNBOUNDED;
        return STUCK;
    }

    double mean(double sum) const { return sum / std::max(1.0, count_); }

    Ending iterate(double tolerance, int64_t max_iterations, bool with_polish, bool bounded) {
        Scaled& k = problem;
        const int refinements = step_kind_ == DIAGONAL_FIRST ? 0 : 2;
        count_ = 0;
        for (Index r = 0; r < k.rows; r++) count_ += k.on[r];
        double last_mu = INF, tried = INF, goal = INF;
        int slow = 0, stalled = 0, waited = 0, further = 0;
        for (int64_t turn = 0;; turn++) {
            const Errors found = k.measure(now_);
            const double residual = found.worst;
            waited++;
            if (residual < 0.5 * goal) goal = residual, waited = 0;
            if (residual < errors.worst) errors = found, problem.copy(state, now_), mark_active(now_, active);
            residuals_now();
            bool changed = false;
            for (Index r = 0; r < k.rows; r++) {
                const double above = there(r) && now_.z[r] > now_.s[r];
                changed = changed || above != above_[r];
                above_[r] = above;
            }
            const bool done = errors.worst <= tolerance;
            if (residual <= tolerance) {
                // Where small multipliers meet small slacks, a point this accurate does not tell yet which rows are active.
                if (!with_polish || polish(errors.worst) || errors.worst <= ENOUGH || further == FURTHER) return CONVERGED;
                further++;
            }
            if (!done && k.soft == 0) {
                const Ending proven = proof(bounded);
                if (proven != STUCK) {
                    problem.copy(state, now_);
                    return proven;
                }
            }
            // The right active set is often known long before the point is accurate.
            if (!done && with_polish && turn && !changed && residual <= TRY && residual <= 0.1 * tried) {
                tried = residual;
                if (polish(ENOUGH)) return CONVERGED;
            }
            // Weights may have grown so large that flat directions of the Hessian are lost: holding rows does not lose them.
            if (may_hold_ && step_kind_ == WEIGHED && waited >= 3 && residual <= NEAR) step_kind_ = HELD, waited = 0;
            if (stalled >= 3 || (!last_ && waited >= PATIENCE)) return STUCK;
            if (iterations >= max_iterations) return AT_LIMIT;

            double sum = 0;
            for (Index r = 0; r < k.rows; r++) {
                sum += there(r) ? now_.s[r] * now_.z[r] : 0.0;
                ratio_[r] = there(r) ? now_.s[r] / now_.z[r] : 1.0;
                tau_[r] = 0;
            }
            const double mu = mean(sum);
            factor_step(ratio_);
            if (!saddle.sound) return BROKEN;
            direction(now_, refinements);
            const double affine = reach();
            sum = 0;
            for (Index r = 0; r < k.rows; r++)
                sum += there(r) ? (now_.s[r] + affine * step_.s[r]) * (now_.z[r] + affine * step_.z[r]) : 0.0;
            const double share = std::min(1.0, std::max(0.0, mean(sum) / (mu > 0 ? mu : 1.0)));
            // Complementarity must not run ahead of feasibility: the weights s/z would drown flat directions. (The gap is
            // complementarity itself, in other units.)
            const double sigma = mu < AHEAD * found.infeasible ? 1.0 : share * share * share;
            for (Index r = 0; r < k.rows; r++) tau_[r] = sigma * mu - step_.s[r] * step_.z[r];
            direction(now_, refinements);
            const double longest = reach();
            double eta = std::min(std::max(1 - mu, 0.995), 1 - 1e-7);
            // An iterate far from the centre is blocked again and again; short steps let the centring work.
            slow += mu > 0.7 * last_mu;
            if (slow >= 2 && longest < 0.9) eta = 0.9;
            // Without inequalities the full step is exact; with them it stays inside.
            const double alpha = longest < 1 || mu > 0 ? std::min(1.0, eta * longest) : longest;
            bool sound = true;
            auto move = [&](double* v, const double* by, Index size) {
                double finite = 0;
                for (Index j = 0; j < size; j++) v[j] += alpha * by[j], finite += v[j] * 0.0;
                sound = sound && finite == 0;
            };
            problem.copy(trial_, now_);
            move(now_.x, step_.x, k.np), move(now_.nu, step_.nu, k.pp), move(now_.s, step_.s, k.rows);
            move(now_.z, step_.z, k.rows);
            if (k.any_fixed) move(now_.y, step_.y, k.np);
            if (!sound) return BROKEN;
            iterations++;
            stalled = alpha < 1e-4 ? stalled + 1 : 0;
            last_mu = mu;
        }
    }
    double count_ = 0;
    static constexpr int PATIENCE = 12;      // steps without half the residual, after which something else is tried
    static constexpr int FURTHER = 5;        // steps below the tolerance in search of the active set
    static constexpr double NEAR = 1e-3;     // residual from which on slow progress is blamed on the weights
    static constexpr double LIGHT = 1e-8;    // weight of the rows at the last start, which almost forgets them
    bool last_ = true;                       // no other start will be tried
    bool may_hold_ = false;                  // rows may be held in Newton steps, if they are not from the start

    // The longest step <= 1 that keeps s and z nonnegative.
    double reach() const {
        double blocked = 1;
        for (Index r = 0; r < problem.rows; r++) {
            if (!there(r)) continue;
            blocked = vmax(-step_.s[r] / now_.s[r], blocked);
            blocked = vmax(-step_.z[r] / now_.z[r], blocked);
        }
        return 1 / blocked;
    }

    // From now_, whose rows z > s are marked in above_, to the exact point of the active set; rows with a wrong sign
    // change sides. Accepted, into state, errors and active, where signs hold and the residual is at most `allowed` or at
    // rounding level; else these stay as they are.
    bool polish(double allowed, int rounds = FLIPS) {
        Scaled& k = problem;
        std::copy_n(above_, k.rows, flipped_);
        problem.copy(trial_, now_);
        for (int round = 0; round < rounds; round++) {
            const bool sound = hold(flipped_);
            aim(trial_, flipped_);
            double z_size = 0, s_size = 0;
            for (Index r = 0; r < k.rows; r++) {
                z_size = vmax(std::fabs(trial_.z[r]), z_size);
                // (A far side that the point meets must not make room for what it violates.)
                if (flipped_[r] != 0 || trial_.s[r] < 0) s_size = vmax(std::fabs(k.d[r]), s_size);
            }
            const double z_floor = -SIGN * (1 + z_size), s_floor = -SIGN * (1 + s_size);
            bool wrong = false;
            for (Index r = 0; r < k.rows; r++) {
                const bool held = flipped_[r] != 0;
                const bool flip = there(r) && (held ? trial_.z[r] < z_floor : trial_.s[r] < s_floor);
                side_[r] = flip ? 1 - flipped_[r] : flipped_[r];
                wrong = wrong || flip;
            }
            if (!wrong) {
                // (What is negative by rounding only.)
                for (Index r = 0; r < k.rows; r++) trial_.z[r] = std::max(0.0, trial_.z[r]), trial_.s[r] = std::max(0.0, trial_.s[r]);
                const Errors found = k.measure(trial_);
                if (!sound || !(found.worst <= allowed || found.worst <= ENOUGH)) return false;
                errors = found;
                problem.copy(state, trial_);
                std::copy_n(flipped_, k.rows, active);
                return true;
            }
            bool finite = true;
            for (Index j = 0; j < k.k.n; j++) finite = finite && std::isfinite(trial_.x[j]);
            if (!finite) return false;
            std::copy_n(side_, k.rows, flipped_);
        }
        return false;
    }

    // One Newton step on the conditions of an active set; for a quadratic program it is exact.
    void aim(State& v, const double* marks) {
        Scaled& k = problem;
        const Index n = k.k.n;
        for (Index r = 0; r < k.rows; r++) v.z[r] = marks[r] != 0 ? v.z[r] : 0.0;
        k.times_Q(v.x, right_);
        for (Index j = 0; j < k.np; j++) right_[j] += k.q[j];
        k.add_pull(v.nu, right_);
        k.add_push(v.z, v.y, right_);
        for (Index j = 0; j < k.np; j++) right_[j] = -right_[j];
        k.times_A(v.x, Ax_);
        for (Index r = 0; r < k.pp; r++) right_[saddle.at_eq + r] = k.b[r] - Ax_[r] + k.soft * v.nu[r];
        k.times_C(v.x, Cx_);
        for (Index r = 0; r < k.mp; r++)
            right_[saddle.at_row + r] = marks[r] != 0 ? k.d[r] - Cx_[r] + k.soft * v.z[r] : 0.0;
        for (Index j = 0; k.k.bounded() && j < n; j++) {
            const Index l = k.lower_at + j, u = k.upper_at + j;
            // A lower-bound row reads -x <= -lower: its distance has the opposite sign of x.
            double off = 0;
            if (k.k.lower && marks[l] != 0) off = -(k.d[l] - Cx_[l]);
            else if (k.k.upper && marks[u] != 0) off = k.d[u] - Cx_[u];
            right_[saddle.at_bound + j] = k.fixed[j] != 0 ? k.target[j] - v.x[j] : off;
        }
        saddle.solve_accurately(right_, u_);
        for (Index j = 0; j < k.np; j++) v.x[j] += u_[j];
        for (Index r = 0; r < k.pp; r++) v.nu[r] += u_[saddle.at_eq + r];
        for (Index r = 0; r < k.mp; r++) v.z[r] += marks[r] != 0 ? u_[saddle.at_row + r] : 0.0;
        for (Index j = 0; k.k.bounded() && j < n; j++) {
            const Index l = k.lower_at + j, u = k.upper_at + j;
            const double force = u_[saddle.at_bound + j];
            if (k.fixed[j] != 0) {
                v.y[j] += force;
                v.x[j] = k.target[j];  // to the last bit
            } else if (k.k.lower && marks[l] != 0) {
                v.z[l] -= force;
                v.x[j] = -k.d[l];
            } else if (k.k.upper && marks[u] != 0) {
                v.z[u] += force;
                v.x[j] = k.d[u];
            }
        }
        k.times_C(v.x, Cx_);
        for (Index r = 0; r < k.rows; r++)
            v.s[r] = !there(r) ? 1.0 : marks[r] != 0 ? 0.0 : k.d[r] - Cx_[r] + (r < k.mp ? k.soft * v.z[r] : 0.0);
    }
};

}  // namespace diffopt
