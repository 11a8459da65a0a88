// One quadratic program in equilibrated units, whatever its structure: what the general method works on.
//
//   minimise 1/2 x'Qx + q'x  subject to  Ax - soft nu = b,  Cx - soft z <= d,  x = target where fixed
//
// The rows of C are those of G, then lower bounds (-x <= -lower), then upper bounds; `on` says which exist. `soft` is 0,
// or 1 for the least-infeasibility problem, whose rows of A and G may be missed at the price of half the square.
#pragma once
#include "batch.hpp"
#include "dense.hpp"
#include "limits.hpp"

namespace diffopt {

struct Sizes {
    Index n = 0, p = 0, m = 0, rank = 0;
    bool lower = false, upper = false;
    int64_t hessian = DENSE;
    explicit Sizes(const Batch& b)
        : n(b.n), p(b.p), m(b.m), rank(b.hessian == DIAGONAL_PLUS_LOW_RANK ? b.rank : 0), lower(b.has(FIELD_LOWER)),
          upper(b.has(FIELD_UPPER)), hessian(b.hessian) {}
    Sizes() = default;
    bool operator==(const Sizes& o) const {
        return n == o.n && p == o.p && m == o.m && rank == o.rank && lower == o.lower && upper == o.upper &&
               hessian == o.hessian;
    }
    bool bounded() const { return lower || upper; }
};

// The residuals of a point: primal, dual and gap in original units; the worst of all in both units, and that without the
// gap.
struct Errors {
    double original[3] = {INF, INF, INF};
    double worst = INF, infeasible = INF;
    double worst_original() const { return vmax_nan(vmax_nan(original[0], original[1]), original[2]); }
};

// An iterate or a direction. nu: p; y: the force of the fixed variables, n; s and z: all rows of C.
struct State {
    double *x, *nu, *y, *s, *z;
};

enum Screen { SOUND, NONFINITE, CROSSED };

class Scaled {
  public:
    using P = Single;
    Sizes k;
    Index np, pp, mp, rows;    // padded sizes; rows of C: mp, then np for each kind of bound
    Index lower_at, upper_at;  // where the bounds begin among the rows of C
    double *Q, *diagonal, *F;  // n x np if dense; else np entries and the columns of the low-rank factor, rank x np
    double *A, *G;             // p x np, m x np
    double *q, *b, *d, *on, *fixed, *target;
    double *dx, *eq, *row;     // the scaling of x, of the equalities, of the rows of G
    double cost = 1, soft = 0;
    double size = 1, force = 1;  // what x, s, b, d and target, and what q and the multipliers are divided by
    bool any_fixed = false;

    explicit Scaled(const Sizes& sizes)
        : k(sizes), np(padded<P>(k.n)), pp(padded<P>(k.p)), mp(padded<P>(k.m)) {
        lower_at = mp;
        upper_at = lower_at + (k.lower ? np : 0);
        rows = upper_at + (k.upper ? np : 0);
    }
    bool dense() const { return k.hessian == DENSE; }
    Index packs() const { return np / P::E; }

    void plan(Arena& arena) {
        Q = dense() ? arena.take(k.n * np) : nullptr;
        diagonal = arena.take(np);
        F = arena.take(k.rank * np);
        A = arena.take(k.p * np);
        G = arena.take(k.m * np);
        for (double** v : {&q, &fixed, &target, &dx, &work_n_, &norm_, &Qx_, &pull_, &push_}) *v = arena.take(np);
        for (double** v : {&b, &eq, &Ax_}) *v = arena.take(pp);
        row = arena.take(mp);
        for (double** v : {&d, &on, &Cx_}) *v = arena.take(rows);
        work_k_ = arena.take(padded<P>(k.rank) + W);
    }
    State take_state(Arena& arena) const {
        State v;
        v.x = arena.take(np), v.nu = arena.take(pp), v.y = arena.take(np);
        v.s = arena.take(rows), v.z = arena.take(rows);
        return v;
    }
    void copy(State& to, const State& from) const {
        std::copy_n(from.x, np, to.x), std::copy_n(from.nu, pp, to.nu), std::copy_n(from.y, np, to.y);
        std::copy_n(from.s, rows, to.s), std::copy_n(from.z, rows, to.z);
    }

    // ---- data ------------------------------------------------------------------------------------------------

    // Reads an instance in original units; h, lower and upper lie in d, with the signs of C's rows.
    template <class T> void read(const Batch& batch, Index i) {
        const Index n = k.n;
        auto value = [](T v) { return static_cast<double>(v); };
        if (dense()) {
            const T* source = batch.at<T>(FIELD_Q, i);
            for (Index r = 0; r < n; r++)
                for (Index c = 0; c <= r; c++)
                    Q[r * np + c] = Q[c * np + r] = 0.5 * (value(source[r * n + c]) + value(source[c * n + r]));
        } else {
            const T* source = batch.at<T>(FIELD_Q, i);
            for (Index j = 0; j < n; j++) diagonal[j] = value(source[j]);
            if (k.rank) {
                const T* factor = batch.at<T>(FIELD_FACTOR, i);
                for (Index c = 0; c < k.rank; c++)
                    for (Index j = 0; j < n; j++) F[c * np + j] = value(factor[j * k.rank + c]);
            }
        }
        auto matrix = [&](Field field, Index count, double* target_rows) {
            const T* source = count ? batch.at<T>(field, i) : nullptr;
            for (Index r = 0; r < count; r++)
                for (Index j = 0; j < n; j++) target_rows[r * np + j] = value(source[r * n + j]);
        };
        matrix(FIELD_A, k.p, A);
        matrix(FIELD_G, k.m, G);
        auto vector = [&](Field field, Index size, double* values, double sign) {
            const T* source = size ? batch.at<T>(field, i) : nullptr;
            for (Index j = 0; j < size; j++) values[j] = sign * value(source[j]);
        };
        vector(FIELD_q, n, q, 1);
        vector(FIELD_b, k.p, b, 1);
        vector(FIELD_h, k.m, d, 1);
        if (k.lower) vector(FIELD_LOWER, n, d + lower_at, -1);
        if (k.upper) vector(FIELD_UPPER, n, d + upper_at, 1);
    }

    // Whether the data, in original units, can be solved at all. `worst`: the variable whose bounds cross most.
    Screen screen(Index& worst) const {
        double finite = 0;  // stays zero only if nothing is infinite or NaN
        auto look = [&](const double* v, Index size) {
            double sum = 0;
            for (Index j = 0; j < size; j++) sum += v[j] * 0.0;
            finite += sum;
        };
        if (dense()) look(Q, k.n * np);
        else look(diagonal, np), look(F, k.rank * np);
        look(q, np), look(A, k.p * np), look(b, pp), look(G, k.m * np);
        bool wrong = !(finite == 0);
        for (Index r = 0; r < rows; r++) wrong |= !(d[r] > -INF);
        if (wrong) return NONFINITE;
        if (!(k.lower && k.upper)) return SOUND;
        double most = 0;
        for (Index j = 0; j < k.n; j++) {
            const double width = -d[lower_at + j] - d[upper_at + j];
            if (width > most) most = width, worst = j;
        }
        return most > 0 ? CROSSED : SOUND;
    }

    // Finds the scaling (as diffopt.linalg.scaling.equilibrate: Ruiz passes, then powers of two) and applies it.
    void equilibrate() {
        const Index n = k.n;
        hessian_sizes(norm_);
        std::fill_n(dx, np, 1.0);
        std::fill_n(eq, pp, 1.0);
        std::fill_n(row, mp, 1.0);
        double* column = work_n_;
        auto visit = [&](const double* matrix, Index count, double* scale) {
            for (Index r = 0; r < count; r++) {
                Vec most{};
                const Vec own = P::splat(scale[r]);
                for (Index v = 0; v < packs(); v++) {
                    const Vec x = vabs(P::load(matrix + r * np + v * W)) * P::load(dx + v * W) * own;
                    most = vmax(x, most);
                    P::store(column + v * W, vmax(x, P::load(column + v * W)));
                }
                norms_.push_back(P::max(most));
            }
        };
        for (int pass = 0; pass < EQUILIBRATION_PASSES; pass++) {
            for (Index j = 0; j < np; j++) column[j] = dx[j] * norm_[j] * dx[j];
            norms_.clear();
            visit(A, k.p, eq);
            visit(G, k.m, row);
            for (Index r = 0; r < k.p; r++) eq[r] *= inverse_root(norms_[static_cast<std::size_t>(r)]);
            for (Index r = 0; r < k.m; r++) row[r] *= inverse_root(norms_[static_cast<std::size_t>(k.p + r)]);
            for (Index j = 0; j < n; j++) dx[j] *= inverse_root(column[j]);
        }
        for (Index j = 0; j < np; j++) dx[j] = power_of_two(dx[j]);
        for (Index r = 0; r < pp; r++) eq[r] = power_of_two(eq[r]);
        for (Index r = 0; r < mp; r++) row[r] = power_of_two(row[r]);
        scale_hessian(1);
        column_norms(norm_);
        double largest = 0, linear = 0;
        for (Index j = 0; j < n; j++) largest = vmax(norm_[j], largest), linear = vmax(std::fabs(dx[j] * q[j]), linear);
        curved_ = largest > 0;
        cost = power_of_four(1 / (curved_ ? largest : linear));
        apply_scaling();
        shrink();
    }

    // Applies a scaling that is known, to the matrices: dx, eq, row and cost.
    void rescale() {
        scale_hessian(1);
        column_norms(norm_);
        size = force = 1;
        double largest = 0;
        for (Index j = 0; j < k.n; j++) largest = vmax(norm_[j], largest);
        curved_ = largest > 0;
        apply_scaling();
    }

    // ---- products --------------------------------------------------------------------------------------------

    // out = Q x
    void times_Q(const double* x, double* out) {
        std::fill_n(out, np, 0.0);
        if (dense()) {
            add_product<P>(Q, np, k.n, x, 1, out, 0, packs());
            return;
        }
        for (Index j = 0; j < np; j++) out[j] = diagonal[j] * x[j];
        if (!k.rank) return;
        std::fill_n(work_k_, padded<P>(k.rank), 0.0);
        add_product<P>(F, np, k.rank, x, 1, work_k_, 0, packs());
        add_transposed<P>(F, np, k.rank, work_k_, 1, out, 0, packs());
    }
    // out = A x
    void times_A(const double* x, double* out) const {
        std::fill_n(out, pp, 0.0);
        add_product<P>(A, np, k.p, x, 1, out, 0, packs());
    }
    // out = C x, all rows, whether they exist or not
    void times_C(const double* x, double* out) const {
        std::fill_n(out, mp, 0.0);
        add_product<P>(G, np, k.m, x, 1, out, 0, packs());
        if (k.lower)
            for (Index j = 0; j < np; j++) out[lower_at + j] = -x[j];
        if (k.upper)
            for (Index j = 0; j < np; j++) out[upper_at + j] = x[j];
    }
    // out += A'nu
    void add_pull(const double* nu, double* out) const { add_transposed<P>(A, np, k.p, nu, 1, out, 0, packs()); }
    // out += C'z + y
    void add_push(const double* z, const double* y, double* out) const {
        add_transposed<P>(G, np, k.m, z, 1, out, 0, packs());
        for (Index j = 0; k.lower && j < np; j++) out[j] -= z[lower_at + j];
        for (Index j = 0; k.upper && j < np; j++) out[j] += z[upper_at + j];
        for (Index j = 0; any_fixed && j < np; j++) out[j] += y[j];
    }

    // ---- residuals -------------------------------------------------------------------------------------------

    // Those of diffopt.solution.Residuals. Multipliers of rows that do not exist must be zero.
    Errors measure(const State& v) {
        const Index n = k.n;
        times_Q(v.x, Qx_);
        std::fill_n(pull_, np, 0.0);
        std::fill_n(push_, np, 0.0);
        add_pull(v.nu, pull_);
        add_push(v.z, v.y, push_);
        times_A(v.x, Ax_);
        times_C(v.x, Cx_);
        double slope[2] = {}, slope_size[2] = {}, off[2] = {}, off_size[2] = {};
        auto take = [](double (&errors)[2], double error, double unit) {
            errors[0] = vmax_nan(error * unit, errors[0]);
            errors[1] = vmax_nan(error, errors[1]);
        };
        auto largest = [](double a, double c) { return vmax(std::fabs(a), std::fabs(c)); };
        double curved = 0, linear = 0, equal = 0, sided = 0;
        for (Index j = 0; j < n; j++) {
            const double unit = force / (cost * dx[j]);
            take(slope, std::fabs(Qx_[j] + q[j] + pull_[j] + push_[j]), unit);
            take(slope_size, vmax(largest(Qx_[j], q[j]), largest(pull_[j], push_[j])), unit);
            curved += Qx_[j] * v.x[j];
            linear += q[j] * v.x[j];
            if (!any_fixed || fixed[j] == 0) continue;
            take(off, std::fabs(v.x[j] - target[j]), dx[j] * size);
            sided += target[j] * v.y[j];
        }
        for (Index r = 0; r < k.p; r++) {
            const double value = Ax_[r] - soft * v.nu[r], unit = size / eq[r];
            take(off, std::fabs(value - b[r]), unit);
            take(off_size, largest(value, b[r]), unit);
            equal += b[r] * v.nu[r] + soft * v.nu[r] * v.nu[r];
        }
        for (Index r = 0; r < rows; r++) {
            if (on[r] == 0) continue;
            const bool general = r < mp;
            const double value = Cx_[r] - (general ? soft * v.z[r] : 0.0);
            const double unit = size * (general ? 1 / row[r] : dx[(r - mp) % np]);
            take(off, vmax_nan(value - d[r], 0.0), unit);
            // A far side that x meets must not hide what else it violates.
            take(off_size, value > d[r] ? largest(value, d[r]) : std::fabs(value), unit);
            sided += d[r] * v.z[r] + (general ? soft * v.z[r] * v.z[r] : 0.0);
        }
        const double total = std::fabs(curved + linear + equal + sided);
        const double term = vmax(largest(curved, linear), largest(equal, sided));
        Errors found;
        found.worst = found.infeasible = 0;
        for (int units = 0; units < 2; units++) {
            const double scale = units ? 1.0 : size * force / cost;
            const double all[3] = {off[units] / (1 + off_size[units]), slope[units] / (1 + slope_size[units]),
                                   total * scale / (1 + term * scale)};
            for (int e = 0; e < 3; e++) {
                if (units == 0) found.original[e] = all[e];
                found.worst = vmax_nan(all[e], found.worst);
                if (e < 2) found.infeasible = vmax_nan(all[e], found.infeasible);
            }
        }
        return found;
    }

    // ---- proofs: how small what should be zero has to be ----------------------------------------------------------

    // How far away from 0 the contradiction of a Farkas direction of this depth lies, at least 1: the largest side that has
    // a share in it. (One row with a side of 1e10 contradicts nothing, although 1e-10 times the row is almost zero.)
    double reach(const State& v, double depth) const {
        double most = 1;
        auto take = [&](double side, double multiplier) {
            if (std::fabs(side * multiplier) >= SHARE * depth) most = vmax(std::fabs(side), most);
        };
        for (Index r = 0; r < k.p; r++) take(b[r], v.nu[r]);
        for (Index r = 0; r < rows; r++) take(d[r], on[r] != 0 ? v.z[r] : 0.0);
        for (Index j = 0; any_fixed && j < k.n; j++) take(target[j], v.y[j]);
        return most;
    }
    // The length of a direction along which the objective falls by this much, at most the fall, of what has a share in it.
    double stride(const double* x, double fall) const {
        double most = 0;
        for (Index j = 0; j < k.n; j++)
            if (std::fabs(q[j] * x[j]) >= SHARE * fall) most = vmax(std::fabs(x[j]), most);
        return vmin(fall, most);
    }

    // Whether the Hessian is positive definite with an estimated condition up to SAFE_CONDITION; `factor`: n x np.
    bool strictly_convex(double* factor, double* inverse) const {
        if (!dense()) {
            double least = INF, most = 0;
            for (Index j = 0; j < k.n; j++) least = vmin(diagonal[j], least), most = vmax(diagonal[j], most);
            return least > 0 && least * SAFE_CONDITION >= most;
        }
        const auto pivots = cholesky<P>(Q, np, nullptr, factor, np, k.n, inverse);
        return pivots.positive && pivots.smallest * SAFE_CONDITION >= pivots.largest;
    }

  private:
    double *work_n_, *norm_, *Qx_, *pull_, *push_, *Ax_, *Cx_, *work_k_;
    std::vector<double> norms_;
    bool curved_ = false;

    static double inverse_root(double norm) { return norm > 0 && norm < INF ? 1 / std::sqrt(norm) : 1.0; }

    // The diagonal of the Hessian: no entry of a positive semidefinite matrix is larger than the geometric mean of its two
    // diagonal ones, in any units, so balancing these balances all.
    void hessian_sizes(double* out) const {
        std::fill_n(out, np, 0.0);
        for (Index j = 0; j < k.n; j++) {
            out[j] = std::max(dense() ? Q[j * np + j] : diagonal[j], 0.0);  // (below zero it is a rounding error, or refused)
            for (Index c = 0; !dense() && c < k.rank; c++) out[j] += F[c * np + j] * F[c * np + j];
        }
    }

    // The largest magnitude of each column of Q, or a bound of it.
    void column_norms(double* out) const {
        std::fill_n(out, np, 0.0);
        if (dense()) {
            for (Index r = 0; r < k.n; r++)
                for (Index v = 0; v < packs(); v++)
                    P::store(out + v * W, vmax(vabs(P::load(Q + r * np + v * W)), P::load(out + v * W)));
            return;
        }
        double most = 0;
        for (Index c = 0; c < k.rank; c++)
            for (Index j = 0; j < k.n; j++) out[j] += F[c * np + j] * F[c * np + j];
        for (Index j = 0; j < k.n; j++) out[j] = std::sqrt(out[j]), most = vmax(out[j], most);
        for (Index j = 0; j < k.n; j++) out[j] = std::fabs(diagonal[j]) + out[j] * most;  // Cauchy and Schwarz
    }

    void scale_hessian(double factor) {
        if (dense()) {
            for (Index r = 0; r < k.n; r++) {
                const Vec own = P::splat(dx[r] * factor);
                for (Index v = 0; v < packs(); v++)
                    P::store(Q + r * np + v * W, P::load(Q + r * np + v * W) * own * P::load(dx + v * W));
            }
            return;
        }
        const double root = std::sqrt(factor);
        for (Index j = 0; j < np; j++) diagonal[j] *= dx[j] * dx[j] * factor;
        for (Index c = 0; c < k.rank; c++)
            for (Index j = 0; j < np; j++) F[c * np + j] *= dx[j] * root;
    }

    // The rest of a scaling, once dx has been applied to the Hessian; and what of the rows exists.
    // Solutions grow with q, b and the sides; without curvature, q moves the multipliers alone. Where they must be large,
    // their unit becomes what they must be at least: steps and proofs know of sizes near 1.
    void shrink() {
        double most = 0, least = INF;
        for (Index j = 0; j < np; j++) {
            if (curved_) most = vmax(std::fabs(q[j]), most);
            most = vmax(std::fabs(target[j]), most);
        }
        for (Index r = 0; r < pp; r++) most = vmax(std::fabs(b[r]), most);
        for (Index r = 0; r < rows; r++) {
            if (on[r] == 0) continue;
            most = vmax(-d[r], most);  // violated at 0
            if (d[r] > 0) least = vmin(d[r], least);
        }
        // (A linear program ends at sides, if not at those that are violated at 0.)
        if (!curved_ && least < INF) most = vmax(least, most);
        size = most > LARGE && most < INF ? power_of_two(most) : 1.0;
        force = curved_ ? size : 1.0;
        if (size == 1) return;
        const double by = 1 / size;
        for (Index j = 0; j < np; j++) q[j] /= force, target[j] *= by;
        for (Index r = 0; r < pp; r++) b[r] *= by;
        for (Index r = 0; r < rows; r++) d[r] *= by;
    }

    void apply_scaling() {
        const Index n = k.n;
        if (curved_ && cost != 1) {
            const double root = std::sqrt(cost);
            if (dense())
                for (Index e = 0; e < n * np; e++) Q[e] *= cost;
            else {
                for (Index j = 0; j < np; j++) diagonal[j] *= cost;
                for (Index e = 0; e < k.rank * np; e++) F[e] *= root;
            }
        }
        auto matrix = [&](double* entries, Index count, const double* scale) {
            for (Index r = 0; r < count; r++)
                for (Index j = 0; j < np; j++) entries[r * np + j] *= scale[r] * dx[j];
        };
        matrix(A, k.p, eq);
        matrix(G, k.m, row);
        for (Index j = 0; j < np; j++) q[j] *= cost * dx[j];
        for (Index r = 0; r < pp; r++) b[r] *= eq[r];
        any_fixed = false;
        std::fill_n(fixed, np, 0.0);
        std::fill_n(target, np, 0.0);
        if (k.lower && k.upper)
            for (Index j = 0; j < n; j++)
                if (-d[lower_at + j] == d[upper_at + j]) {
                    fixed[j] = 1, any_fixed = true;
                    target[j] = d[upper_at + j] / dx[j];
                }
        std::fill_n(on, rows, 0.0);
        auto side = [&](Index at, Index size, auto unit, bool bound) {
            for (Index j = 0; j < size; j++) {
                const bool here = d[at + j] < INF && !(bound && fixed[j] != 0);
                on[at + j] = here;
                d[at + j] = here ? d[at + j] * unit(j) : 0.0;
            }
        };
        side(0, k.m, [&](Index j) { return row[j]; }, false);
        if (k.lower) side(lower_at, n, [&](Index j) { return 1 / dx[j]; }, true);
        if (k.upper) side(upper_at, n, [&](Index j) { return 1 / dx[j]; }, true);
    }
};

}  // namespace diffopt
