// One problem to its end: solved, or proven to have no solution, or given up. As diffopt.solvers.certificates.
//
// Two auxiliary problems always have a solution, and theirs is the proof:
//   least infeasibility,  min 1/2 |Ax - b|^2 + 1/2 |(Gx - h)+|^2  within the bounds: its multipliers are a Farkas direction;
//   steepest recession,   min 1/2 |v + q|^2  subject to  Qv = 0, Av = 0, Gv <= 0, v inside finite bounds.
#pragma once
#include "general.hpp"
#include "saved.hpp"

namespace diffopt {

constexpr double CLAIM = 1e-8;  // largest error of a normalised certificate, in equilibrated units, for which it is claimed
constexpr double FLAT = 1e-12;  // curvature along a direction, relative to its length, that is nothing but rounding error

// A certificate in original units, x, nu, lam, lam_lower, lam_upper one after the other; NaN where it says nothing.
using Ray = std::vector<double>;

class Whole {
  public:
    using P = Single;

    explicit Whole(const Sizes& sizes) : main_(sizes) {
        arena_.lay_out([&](Arena& a) {
            main_.plan(a);
            weak_ = a.take(main_.problem.rows);
            pull_ = a.take(main_.problem.np);
            Cx_ = a.take(main_.problem.rows);
            eq_ = a.take(main_.problem.pp);
            direction_ = main_.problem.take_state(a);
            near_ = main_.problem.take_state(a);
        });
    }

    // Solves instance i and writes its answer; its certificate, if it has one, to `ray` where that is wanted.
    void run(const Batch& batch, const Options& options, const Places& places, Index i, const Answer& answer, Ray* ray) {
        places_ = places;
        Scaled& k = main_.problem;
        main_.iterations = 0;
        if (batch.single) k.read<float>(batch, i);
        else k.read<double>(batch, i);
        Index worst = 0;
        const Screen screened = k.screen(worst);
        if (screened == NONFINITE) return write_nothing(batch, i, NONFINITE_INPUT, answer);
        if (screened == CROSSED) {
            if (ray) write_crossed(worst, *ray);
            return write_nothing(batch, i, PRIMAL_INFEASIBLE, answer);
        }
        k.equilibrate();
        const bool primal = options.reduction == REDUCE_PRIMAL || options.reduction == REDUCE_DUAL;
        const bool near = batch.start.given() && (batch.single ? read_start<float>(batch, i) : read_start<double>(batch, i));
        const Ending end = main_.solve(options.tolerance, options.max_iterations, options.polish, primal, near ? &near_ : nullptr);
        int8_t status = end == AT_LIMIT ? MAX_ITERATIONS : NUMERICAL_ERROR;
        if (main_.errors.worst <= options.tolerance) status = SOLVED;
        else if (end != NOT_CONVEX) status = certify(end, status);
        if (status == PRIMAL_INFEASIBLE || status == DUAL_INFEASIBLE) {
            if (ray) write_ray(status, *ray);
            return write_nothing(batch, i, status, answer);
        }
        // One that was given up may still stand on a good point: believe the residuals, both ways. Those of what is
        // written, that is, which may be rounded.
        if (batch.single) {
            const State &v = main_.state, &rounded = direction_;
            auto round = [](double* to, const double* from, Index size) {
                for (Index j = 0; j < size; j++) to[j] = static_cast<float>(from[j]);
            };
            round(rounded.x, v.x, k.np), round(rounded.nu, v.nu, k.pp), round(rounded.y, v.y, k.np);
            round(rounded.z, v.z, k.rows);
            main_.errors = k.measure(rounded);
        }
        const double found = main_.errors.worst_original();
        if (status == SOLVED || found <= options.almost) status = graded(options, found);
        if (batch.single) write<float>(batch, options, i, status, answer);
        else write<double>(batch, options, i, status, answer);
    }

    // The reduction that instance i went by, last.
    bool diagonal() const { return main_.diagonal(); }

  private:
    General main_;
    Arena arena_;
    Places places_{};
    std::unique_ptr<General> elastic_, recession_;
    Arena elastic_memory_, recession_memory_;
    double *weak_, *pull_, *Cx_, *eq_;
    State direction_;  // the certificate, in equilibrated units
    State near_;       // an earlier solution, in equilibrated units

    // Reads the earlier solution of instance i into near_; false if it is not finite.
    template <class T> bool read_start(const Batch& batch, Index i) {
        const Scaled& k = main_.problem;
        const Start& from = batch.start;
        const State& v = near_;
        const double cost = k.cost / k.force;
        double finite = 0;  // stays zero only if nothing is infinite or NaN
        auto each = [&](const void* values, Index size, auto take) {
            const T* source = static_cast<const T*>(values) + i * size;
            for (Index j = 0; j < size; j++) {
                const double value = static_cast<double>(source[j]);
                finite += value * 0.0;
                take(j, value);
            }
        };
        auto multiplier = [&](Index row, double value) { v.z[row] = k.on[row] != 0 ? std::max(0.0, value) : 0.0; };
        std::fill_n(v.z, k.rows, 0.0), std::fill_n(v.y, k.np, 0.0);
        each(from.x, k.k.n, [&](Index j, double x) { v.x[j] = k.fixed[j] != 0 ? k.target[j] : x / (k.dx[j] * k.size); });
        each(from.nu, k.k.p, [&](Index r, double nu) { v.nu[r] = nu * cost / k.eq[r]; });
        each(from.lam, k.k.m, [&](Index r, double lam) { multiplier(r, lam * cost / k.row[r]); });
        each(from.lower, k.k.n, [&](Index j, double force) {
            if (k.fixed[j] != 0) v.y[j] -= force * cost * k.dx[j];
            else if (k.k.lower) multiplier(k.lower_at + j, force * cost * k.dx[j]);
        });
        each(from.upper, k.k.n, [&](Index j, double force) {
            if (k.fixed[j] != 0) v.y[j] += force * cost * k.dx[j];
            else if (k.k.upper) multiplier(k.upper_at + j, force * cost * k.dx[j]);
        });
        return finite == 0;
    }

    // ---- proofs ----------------------------------------------------------------------------------------------

    int8_t certify(Ending end, int8_t status) {
        if (end == PROVEN_INFEASIBLE && proves_infeasible(main_.state)) return PRIMAL_INFEASIBLE;
        // Before unboundedness: an instance can be both, and then there is no x at all.
        if (proves_infeasible(least_infeasibility()) || proves_infeasible(seen_closer())) return PRIMAL_INFEASIBLE;
        if (end == PROVEN_UNBOUNDED && proves_unbounded(main_.state.x)) return DUAL_INFEASIBLE;
        if (proves_unbounded(steepest_recession())) return DUAL_INFEASIBLE;
        return status;
    }

    // Checks (nu, z, y) as a Farkas direction, normalised to depth -1, into direction_. What is left of A'nu + C'z is
    // absorbed into the multipliers of finite bounds where that is possible.
    bool proves_infeasible(const State& from) {
        const Scaled& k = main_.problem;
        State& v = direction_;
        k.copy(v, from);
        std::fill_n(v.x, k.np, 0.0);
        std::fill_n(v.s, k.rows, 0.0);
        for (Index r = 0; r < k.rows; r++) v.z[r] = k.on[r] != 0 ? std::max(0.0, v.z[r]) : 0.0;
        auto pull = [&] {
            std::fill_n(pull_, k.np, 0.0);
            k.add_pull(v.nu, pull_);
            k.add_push(v.z, v.y, pull_);
        };
        for (int round = 0; round < 2; round++) {
            pull();
            for (Index j = 0; j < k.k.n; j++) {
                double rest = pull_[j];
                if (k.fixed[j] != 0) {
                    v.y[j] -= rest;
                    continue;
                }
                if (k.k.lower && k.on[k.lower_at + j] != 0) {
                    double& z = v.z[k.lower_at + j];
                    const double moved = std::max(0.0, z + rest);
                    rest += z - moved;
                    z = moved;
                }
                if (k.k.upper && k.on[k.upper_at + j] != 0) {
                    double& z = v.z[k.upper_at + j];
                    z = std::max(0.0, z - rest);
                }
            }
        }
        Fall sides;
        for (Index r = 0; r < k.k.p; r++) sides.take(k.b[r] * v.nu[r]);
        for (Index r = 0; r < k.rows; r++) sides.take(k.d[r] * v.z[r]);
        for (Index j = 0; j < k.k.n; j++) sides.take(k.target[j] * v.y[j]);
        const double depth = sides.value();
        if (!(depth > 0 && depth < INF)) return false;
        double error = 0;
        for (Index r = 0; r < k.pp; r++) v.nu[r] /= depth;
        for (Index r = 0; r < k.rows; r++) v.z[r] /= depth;
        for (Index j = 0; j < k.np; j++) v.y[j] /= depth;
        pull();
        for (Index j = 0; j < k.k.n; j++) error = vmax_nan(std::fabs(pull_[j]), error);
        return error * k.reach(v, 1) <= CLAIM;
    }

    // Checks a direction as a proof of unboundedness, normalised to q'x = -1, into direction_.
    bool proves_unbounded(const double* x) {
        Scaled& k = main_.problem;
        State& v = direction_;
        Fall slope;
        for (Index j = 0; j < k.k.n; j++) slope.take(k.q[j] * x[j]);
        const double fall = slope.value();
        if (!(fall > 0 && fall < INF)) return false;
        for (Index j = 0; j < k.np; j++) v.x[j] = x[j] / fall;
        double error = 0, length = 0;
        k.times_Q(v.x, pull_);
        k.times_A(v.x, eq_);
        k.times_C(v.x, Cx_);
        for (Index j = 0; j < k.k.n; j++) error = vmax_nan(std::fabs(pull_[j]), error), length = vmax(std::fabs(v.x[j]), length);
        // A strictly convex objective is bounded below, whatever a direction of tiny curvature suggests. One of none at all
        // shows that the pivots took a singular Hessian for a definite one.
        if (main_.strictly_convex && !(error <= FLAT * length)) return false;
        for (Index j = 0; j < k.k.n; j++) {
            if (k.fixed[j] != 0) error = vmax_nan(std::fabs(v.x[j]), error);
        }
        for (Index r = 0; r < k.k.p; r++) error = vmax_nan(std::fabs(eq_[r]), error);
        for (Index r = 0; r < k.rows; r++)
            if (k.on[r] != 0) error = vmax_nan(Cx_[r], error);
        return error <= CLAIM * k.stride(v.x, 1);
    }

    const State& least_infeasibility() {
        const Scaled& from = main_.problem;
        if (!elastic_) {
            elastic_ = std::make_unique<General>(from.k);
            elastic_memory_.lay_out([&](Arena& a) { elastic_->plan(a); });
        }
        Scaled& k = elastic_->problem;
        const Index n = k.k.n;
        if (k.dense()) std::fill_n(k.Q, n * k.np, 0.0);
        std::fill_n(k.diagonal, k.np, 0.0);
        std::fill_n(k.F, k.k.rank * k.np, 0.0);
        std::fill_n(k.q, k.np, 0.0);
        std::copy_n(from.A, k.k.p * k.np, k.A), std::copy_n(from.G, k.k.m * k.np, k.G);
        std::copy_n(from.b, k.pp, k.b), std::copy_n(from.d, k.rows, k.d), std::copy_n(from.on, k.rows, k.on);
        std::copy_n(from.fixed, k.np, k.fixed), std::copy_n(from.target, k.np, k.target);
        std::fill_n(k.dx, k.np, 1.0), std::fill_n(k.eq, k.pp, 1.0), std::fill_n(k.row, k.mp, 1.0);
        k.any_fixed = from.any_fixed;
        k.cost = 1;
        k.soft = 1;
        elastic_->solve(1e-12, 60, true, true);
        return elastic_->state;
    }

    // The multipliers of least infeasibility are as large as the violations, and only as accurate as rounding errors of
    // x allow. Once more, then, in variables around that x and in units of the largest violation: a combination of the
    // rows that contradicts itself contradicts itself there too.
    const State& seen_closer() {
        Scaled& k = elastic_->problem;
        const State& v = elastic_->state;
        double most = 0;
        for (Index r = 0; r < k.k.p; r++) most = vmax(std::fabs(v.nu[r]), most);
        for (Index r = 0; r < k.k.m; r++) most = vmax(v.z[r], most);
        if (!(most > NOISE)) return v;
        k.times_A(v.x, eq_);
        k.times_C(v.x, Cx_);
        for (Index r = 0; r < k.k.p; r++) k.b[r] = (k.b[r] - eq_[r]) / most;
        for (Index r = 0; r < k.rows; r++)
            if (k.on[r] != 0) k.d[r] = (k.d[r] - Cx_[r]) / most;
        for (Index j = 0; j < k.k.n; j++)
            if (k.fixed[j] != 0) k.target[j] = 0;
        elastic_->solve(1e-12, 60, true, true);
        return elastic_->state;
    }

    const double* steepest_recession() {
        const Scaled& from = main_.problem;
        const Index n = from.k.n, p = from.k.p;
        if (!recession_) {
            Sizes sizes = from.k;
            sizes.hessian = DIAGONAL, sizes.rank = 0, sizes.p = n + p;
            recession_ = std::make_unique<General>(sizes);
            recession_memory_.lay_out([&](Arena& a) { recession_->plan(a); });
        }
        Scaled& k = recession_->problem;
        for (Index j = 0; j < k.np; j++) k.diagonal[j] = j < n;
        if (from.dense()) {
            std::copy_n(from.Q, n * k.np, k.A);
        } else {
            for (Index r = 0; r < n; r++)
                for (Index j = 0; j < n; j++) {
                    double sum = r == j ? from.diagonal[j] : 0.0;
                    for (Index c = 0; c < from.k.rank; c++) sum += from.F[c * k.np + r] * from.F[c * k.np + j];
                    k.A[r * k.np + j] = sum;
                }
        }
        std::copy_n(from.A, p * k.np, k.A + n * k.np);
        std::copy_n(from.G, k.k.m * k.np, k.G);
        double size = 0;
        for (Index j = 0; j < n; j++) size = vmax(std::fabs(from.q[j]), size);
        for (Index j = 0; j < k.np; j++) k.q[j] = from.q[j] / (size > 0 ? size : 1.0);
        std::fill_n(k.b, k.pp, 0.0);
        // Directions: sides that exist become zero, and a fixed variable does not move.
        for (Index r = 0; r < k.rows; r++) {
            const bool bound = r >= k.mp;
            const Index entry = bound ? (r - k.mp) % k.np : r;
            const bool fixed = bound && from.fixed[entry] != 0, padding = entry >= (bound ? n : k.k.m);
            k.d[r] = from.on[r] != 0 || fixed || padding ? 0.0 : INF;
        }
        k.equilibrate();
        recession_->solve(1e-12, 60, true, false);
        const Scaled& done = recession_->problem;
        for (Index j = 0; j < n; j++) pull_[j] = recession_->state.x[j] * done.dx[j];  // (in any unit: a direction)
        std::copy_n(pull_, n, recession_->state.x);
        return recession_->state.x;
    }

    // ---- answers ---------------------------------------------------------------------------------------------

    // No solution exists: NaN, so that no loss can use it unawares.
    void write_nothing(const Batch& batch, Index i, int8_t status, const Answer& answer) {
        const Sizes& k = main_.problem.k;
        auto fill = [&](auto zero) {
            using T = decltype(zero);
            auto nan = [&](void* v, Index size) {
                std::fill_n(static_cast<T*>(v) + i * size, size, std::numeric_limits<T>::quiet_NaN());
            };
            nan(answer.x, k.n), nan(answer.s, k.m), nan(answer.lam, k.m), nan(answer.nu, k.p);
            nan(answer.lower, k.n), nan(answer.upper, k.n);
        };
        if (batch.single) fill(0.0f);
        else fill(0.0);
        write_report(batch, i, status, 0, main_.iterations, answer);
        for (int e = 0; e < 3; e++) answer.residuals[e * batch.count + i] = std::numeric_limits<double>::quiet_NaN();
        answer.dependent[i] = -1;
        if (answer.saved) *places_.at(answer, i) = NO_SOLUTION;
    }

    void write_report(const Batch& batch, Index i, int8_t status, int64_t weak, int64_t steps, const Answer& answer) {
        answer.status[i] = status;
        answer.iterations[i] = steps;
        answer.weak[i] = weak;
        for (int e = 0; e < 3; e++) answer.residuals[e * batch.count + i] = main_.errors.original[e];
    }

    template <class T> void write(const Batch& batch, const Options& options, Index i, int8_t status, const Answer& answer) {
        const Scaled& k = main_.problem;
        const State& v = main_.state;
        const Index n = k.k.n, p = k.k.p, m = k.k.m;
        auto at = [&](void* base, Index size) { return static_cast<T*>(base) + i * size; };
        T *x = at(answer.x, n), *nu = at(answer.nu, p), *lam = at(answer.lam, m), *s = at(answer.s, m);
        T *lower = at(answer.lower, n), *upper = at(answer.upper, n);
        for (Index j = 0; j < n; j++) {
            x[j] = static_cast<T>((k.fixed[j] != 0 ? k.target[j] : v.x[j]) * (k.dx[j] * k.size));
            const double unit = k.force / (k.cost * k.dx[j]);
            double low = k.k.lower && k.on[k.lower_at + j] != 0 ? v.z[k.lower_at + j] : 0.0;
            double high = k.k.upper && k.on[k.upper_at + j] != 0 ? v.z[k.upper_at + j] : 0.0;
            if (k.fixed[j] != 0) low = std::max(0.0, -v.y[j]), high = std::max(0.0, v.y[j]);
            lower[j] = static_cast<T>(low * unit);
            upper[j] = static_cast<T>(high * unit);
        }
        for (Index r = 0; r < p; r++) nu[r] = static_cast<T>(k.eq[r] * v.nu[r] * k.force / k.cost);
        for (Index r = 0; r < m; r++) {
            const bool here = k.on[r] != 0;
            lam[r] = static_cast<T>(here ? k.row[r] * v.z[r] * k.force / k.cost : 0.0);
            s[r] = static_cast<T>(here ? v.s[r] * k.size / k.row[r] : INF);
        }
        // Weakly active rows hold with equality and have no multiplier; a derivative leaves them out.
        k.times_C(v.x, Cx_);
        const double small = options.weak_tolerance;
        int64_t weak = 0;
        for (Index r = 0; r < k.rows; r++) {
            const bool held = main_.active[r] != 0;
            const double slack = held ? std::min(0.0, v.s[r]) : r < k.mp ? v.s[r] : k.d[r] - Cx_[r];
            const bool is_weak = k.on[r] != 0 && slack * k.size <= small && v.z[r] * k.force <= small;
            weak += is_weak;
            weak_[r] = held && !is_weak;
        }
        const bool usable = status == SOLVED || status == ALMOST_SOLVED;
        write_report(batch, i, status, usable ? weak : 0, main_.iterations, answer);
        if (usable) main_.hold(weak_);
        answer.dependent[i] = usable ? main_.saddle.dependent() : -1;
        if (!answer.saved) return;
        if (!usable) {
            *places_.at(answer, i) = NO_SOLUTION;
            return;
        }
        const Sides record(batch, places_.at(answer, i), places_.step(i));
        record.start(k.cost, main_.diagonal());
        for (Index j = 0; j < n; j++) record.d[j] = k.dx[j];
        for (Index r = 0; r < p; r++) record.eq[r] = k.eq[r];
        for (Index r = 0; r < m; r++) record.rows[r] = k.row[r];
        for (Index r = 0; r < m; r++) record.row[r] = weak_[r];
        for (Index j = 0; j < n; j++) {
            double side = FREE;
            if (k.fixed[j] != 0) side = v.y[j] < 0 ? FIXED_DOWN : FIXED_UP;
            else if (k.k.lower && weak_[k.lower_at + j] != 0) side = AT_LOWER;
            else if (k.k.upper && weak_[k.upper_at + j] != 0) side = AT_UPPER;
            record.bound[j] = side;
        }
    }

    void write_ray(int8_t status, Ray& ray) const {
        const Scaled& k = main_.problem;
        const State& v = direction_;
        const Index n = k.k.n, p = k.k.p, m = k.k.m;
        ray.assign(static_cast<std::size_t>(3 * n + p + m), std::numeric_limits<double>::quiet_NaN());
        double *x = ray.data(), *nu = x + n, *lam = nu + p, *lower = lam + m, *upper = lower + n;
        // Scaled depth is cost / force times the original one for x, and for duals 1 / size times.
        if (status == DUAL_INFEASIBLE) {
            for (Index j = 0; j < n; j++) x[j] = v.x[j] * k.dx[j] * k.cost / k.force;
            return;
        }
        for (Index r = 0; r < p; r++) nu[r] = k.eq[r] * v.nu[r] / k.size;
        for (Index r = 0; r < m; r++) lam[r] = k.row[r] * v.z[r] / k.size;
        for (Index j = 0; j < n; j++) {
            double low = k.k.lower ? v.z[k.lower_at + j] : 0.0, high = k.k.upper ? v.z[k.upper_at + j] : 0.0;
            if (k.fixed[j] != 0) low = std::max(0.0, -v.y[j]), high = std::max(0.0, v.y[j]);
            lower[j] = low / (k.dx[j] * k.size);
            upper[j] = high / (k.dx[j] * k.size);
        }
    }

    // lower > upper: the two bounds of the worst variable contradict each other.
    void write_crossed(Index worst, Ray& ray) const {
        const Scaled& k = main_.problem;
        const Index n = k.k.n, size = 3 * n + k.k.p + k.k.m;
        ray.assign(static_cast<std::size_t>(size), 0.0);
        std::fill_n(ray.begin(), n, std::numeric_limits<double>::quiet_NaN());
        const double width = -k.d[k.lower_at + worst] - k.d[k.upper_at + worst];
        ray[static_cast<std::size_t>(size - 2 * n + worst)] = 1 / width;
        ray[static_cast<std::size_t>(size - n + worst)] = 1 / width;
    }
};

}  // namespace diffopt
