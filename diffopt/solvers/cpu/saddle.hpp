// The saddle-point system of the general method, and its reductions; as diffopt.linalg.saddle.
//
// For rows that take part ("in"), with e >= 0 their complementarity ratio, the system K u = r is
//
//     Q x + A' eq + G' row + bound = r_x
//     A x - soft * eq              = r_eq
//     G x - e_row * row            = r_row      row = 0 for rows that take no part
//     x - e_bound * bound          = r_bound    one combined force for each variable
//
// A factor is one of K + diag(rho, -delta), of smaller size. It is a preconditioner: solves are refined with K itself.
#pragma once
#include "scaled.hpp"

namespace diffopt {

// WEIGHED is n x n, with rows weighed by 1/e, for Newton steps; HELD is n x n, with one row of a Schur complement for
// each row that takes part, for final active sets (weights there would bury Q under rounding error); DIAGONAL has one row
// for each equality, inequality and column of the low-rank factor, for either, where the diagonal part of Q is positive.
enum Elimination { WEIGHED, HELD, DIAGONAL_FIRST };

constexpr double DELTA = 1e-10, RHO = 1e-9;
constexpr double FINER = 1e-4;            // of delta, for rows that it cannot tell from dependent ones
constexpr double FINE_DEPENDENT = 1e-11;  // DEPENDENT for those; at least this share of the largest entry of the
constexpr double FINE_NOISE = 1e-12;      // Schur complement
constexpr double LITTLE = 1e-13;          // rho of a final active set whose n x n matrix has pivots that are clearly more
constexpr double ROUNDING = 4e-15;        // of the largest diagonal entry: what a factorisation may lose

class Saddle {
  public:
    using P = Single;
    // A vector of the system lies in one array: x at 0, then eq, row, and bound (if there are bounds).
    Index at_eq, at_row, at_bound, size;
    double *row_in, *row_e, *bound_in, *bound_e;  // which rows take part (0 or 1), and their ratios; set by the caller
    bool sound = false;

    explicit Saddle(Scaled& problem) : s(problem) {
        at_eq = s.np;
        at_row = at_eq + s.pp;
        at_bound = at_row + s.mp;
        size = at_bound + (s.k.bounded() ? s.np : 0);
        most_ = s.k.p + s.k.m + s.k.rank;
    }

    void plan(Arena& arena) {
        const Index ld = padded<P>(most_);
        for (double** v : {&row_in, &row_e, &row_w_, &row_delta_}) *v = arena.take(s.mp);
        for (double** v : {&bound_in, &bound_e, &bound_w_, &bound_delta_, &extra_, &H_, &root_h_, &t_, &inv_m_, &Qx_})
            *v = arena.take(s.np);
        for (double** v : {&y_, &inv_s_, &E_}) *v = arena.take(ld);
        eq_delta_ = arena.take(s.pp);
        B_ = arena.take(most_ * s.np);
        V_ = arena.take(s.k.n * ld);
        S_ = arena.take(most_ * ld);
        M_ = arena.take(s.k.n * s.np);
        for (double** v : {&again_, &fix_, &residual_, &candidate_, &part_}) *v = arena.take(size);
    }

    // The deltas are weighed so that the length they favour is that of the duals in original units, within a factor of 10
    // of the average: more would hide rows from the factor.
    void set_shift(bool strictly_convex) {
        rho_ = strictly_convex ? 0.0 : RHO;
        double sum = 0;
        const Index n = s.k.n, p = s.k.p, m = s.k.m;
        for (Index r = 0; r < p; r++) sum += std::log2(s.eq[r]);
        for (Index r = 0; r < m; r++) sum += std::log2(s.row[r]);
        for (Index j = 0; j < n; j++) sum -= std::log2(s.dx[j]);
        const double centre = sum / static_cast<double>(n + p + m);
        auto weight = [&](double scale) {
            return DELTA * std::exp2(std::min(3.0, std::max(-3.0, 2 * (std::log2(scale) - centre))));
        };
        for (Index r = 0; r < p; r++) eq_delta_[r] = weight(s.eq[r]);
        for (Index r = 0; r < m; r++) row_delta_[r] = weight(s.row[r]);
        for (Index j = 0; j < n; j++) bound_delta_[j] = weight(1 / s.dx[j]);
    }

    // Factors for the rows marked in row_in and bound_in; `finer` multiplies delta. False where it broke down.
    bool factor(Elimination how, double finer = 1) {
        how_ = how, finer_ = finer;
        const Index n = s.k.n, m = s.k.m;
        for (Index r = 0; r < m; r++) row_w_[r] = row_in[r] != 0 ? 1 / (row_e[r] + finer * row_delta_[r]) : 0.0;
        if (s.k.bounded())
            for (Index j = 0; j < n; j++) bound_w_[j] = bound_in[j] != 0 ? 1 / (bound_e[j] + finer * bound_delta_[j]) : 0.0;
        list_.clear();
        for (Index r = 0; r < m; r++)
            if (row_in[r] != 0) list_.push_back(r);
        sound = how == DIAGONAL_FIRST ? factor_diagonal() : factor_dense();
        return sound;
    }

    // The same for a final active set. Rows that delta cannot tell from dependent ones are looked at again with a finer one,
    // which stays if they prove independent. (Where they are not, delta must stay well above rounding errors.)
    bool factor_active(Elimination how) {
        if (!factor(how) || dependent() == 0) return sound;
        if (factor(how, FINER) && dependent() == 0) return true;
        return factor(how);
    }

    // How many rows, equalities too, depend on the others.
    int64_t dependent() const {
        if (how_ == WEIGHED && s.soft != 0) return 0;
        // (The second look is near rounding errors, which go by the largest entry.)
        const double floor = finer_ == 1 ? DEPENDENT : std::max(FINE_DEPENDENT, FINE_NOISE * largest_);
        int64_t count = 0;
        for (Index r = 0; r < own(); r++) count += 1 / (inv_s_[r] * inv_s_[r]) < floor;
        return count;
    }

    // Sets the entries of rows that take no part to zero.
    void mask(double* r) const {
        for (Index i = 0; i < s.mp; i++) r[at_row + i] = row_in[i] != 0 ? r[at_row + i] : 0.0;
        if (size > at_bound)
            for (Index j = 0; j < s.np; j++) r[at_bound + j] = bound_in[j] != 0 ? r[at_bound + j] : 0.0;
    }

    // out = K u
    void apply(const double* u, double* out) {
        s.times_Q(u, out);
        s.add_pull(u + at_eq, out);
        add_transposed<P>(s.G, s.np, s.k.m, u + at_row, 1, out, 0, s.packs());
        s.times_A(u, out + at_eq);
        for (Index r = 0; r < s.k.p; r++) out[at_eq + r] -= s.soft * u[at_eq + r];
        std::fill_n(out + at_row, s.mp, 0.0);
        add_product<P>(s.G, s.np, s.k.m, u, 1, out + at_row, 0, s.packs());
        for (Index r = 0; r < s.mp; r++)
            out[at_row + r] = row_in[r] != 0 ? out[at_row + r] - row_e[r] * u[at_row + r] : 0.0;
        if (size == at_bound) return;
        for (Index j = 0; j < s.np; j++) {
            out[j] += u[at_bound + j];
            out[at_bound + j] = bound_in[j] != 0 ? u[j] - bound_e[j] * u[at_bound + j] : 0.0;
        }
    }

    // u = K^-1 r by a fixed number of refinements; r is masked.
    void solve(double* r, double* u, int refinements) {
        mask(r);
        raw(r, u);
        for (int i = 0; i < refinements; i++) {
            apply(u, again_);
            for (Index j = 0; j < size; j++) again_[j] = r[j] - again_[j];
            raw(again_, fix_);
            for (Index j = 0; j < size; j++) u[j] += fix_[j];
        }
    }

    // u = K^-1 r, refined until the residual no longer falls; r is masked. Returns the residual relative to |r|.
    double solve_accurately(double* r, double* u) {
        mask(r);
        const double length = max_abs(r), floor = 4 * 2.220446049250313e-16;
        raw(r, u);
        double error = residual(r, u, residual_);
        for (int i = 0; i < 8; i++) {
            if (!(error > floor * (length + max_abs(u)))) break;
            raw(residual_, fix_);
            for (Index j = 0; j < size; j++) candidate_[j] = u[j] + fix_[j];
            const double worse = residual(r, candidate_, again_);
            if (!(worse < error)) break;
            const double gain = worse / error;
            std::copy_n(candidate_, size, u);
            std::copy_n(again_, size, residual_);
            error = worse;
            if (gain > 0.5) break;
        }
        return length > 0 ? error / length : 0.0;
    }

    // The shortest u that comes nearest to K u = r, where rows depend on each other; else K^-1 r. r is overwritten. Returns
    // the relative residual; to it counts what of r's first block, in x, no u can meet (x is not unique then).
    double solve_minimum_norm(double* r, double* u) {
        if (dependent() == 0) return solve_accurately(r, u);
        mask(r);
        const double length = max_abs(r);
        double lost = 0;
        std::copy_n(r, s.np, candidate_);
        for (int i = 0; i < 3; i++) {
            // R (K + R)^-1 keeps what is outside the range of K, and shrinks the rest by delta.
            raw(r, fix_);
            shift(fix_);
            raw(fix_, part_);
            shift(part_);
            for (Index j = 0; j < size; j++) r[j] -= part_[j];
        }
        for (Index j = 0; j < s.np; j++) lost = vmax_nan(std::fabs(candidate_[j] - r[j]), lost);
        const double error = vmax_nan(solve_accurately(r, u), length > 0 ? lost / length : 0.0);
        for (int i = 0; i < 2; i++) {
            std::copy_n(u, size, fix_);
            shift(fix_);
            raw(fix_, part_);
            shift(part_);
            raw(part_, fix_);
            for (Index j = 0; j < size; j++) u[j] -= fix_[j];
        }
        return error;
    }

    // Whether Q + shift I is positive definite.
    bool hessian_is_definite(double shift) {
        for (Index c = 0; c < s.k.rank; c++) std::copy_n(s.F + c * s.np, s.np, B_ + c * s.np);
        auto all = [](Index) { return Index{0}; };
        gram<P, false>(B_, s.np, s.k.rank, s.k.n, nullptr, 0, M_, s.np, all);
        for (Index j = 0; j < s.k.n; j++) extra_[j] = s.diagonal[j] + shift;
        return cholesky<P>(M_, s.np, extra_, M_, s.np, s.k.n, inv_m_).positive;
    }

    double max_abs(const double* v) const {
        Vec most{};
        Index j = 0;
        for (; j + W <= size; j += W) most = vmax_nan(vabs(P::load(v + j)), most);
        return P::max(most);  // (size is a multiple of W)
    }

  private:
    Scaled& s;
    Index most_;
    Elimination how_ = WEIGHED;
    double rho_ = 0, finer_ = 1, largest_ = 0;
    std::vector<Index> list_;  // rows of G that take part
    Index columns_ = 0, ld_ = 0;
    double *row_w_, *row_delta_, *bound_w_, *bound_delta_, *eq_delta_, *extra_, *H_, *root_h_, *t_, *inv_m_, *Qx_;
    double *y_, *inv_s_, *E_, *B_, *V_, *S_, *M_;
    double *again_, *fix_, *residual_, *candidate_, *part_;

    double residual(const double* r, const double* u, double* out) {
        apply(u, out);
        for (Index j = 0; j < size; j++) out[j] = r[j] - out[j];
        return max_abs(out);
    }

    // v <- R v, R = diag(rho, -delta)
    void shift(double* v) const {
        for (Index j = 0; j < s.np; j++) v[j] *= rho_;
        for (Index r = 0; r < s.pp; r++) v[at_eq + r] *= -finer_ * eq_delta_[r];
        for (Index r = 0; r < s.mp; r++) v[at_row + r] *= -finer_ * row_delta_[r];
        for (Index j = at_bound; j < size; j++) v[j] *= -finer_ * bound_delta_[j - at_bound];
        mask(v);
    }

    // V (n x ld) <- the rows of A, those of G in list_ (if `with_rows`), and of F, as columns.
    void gather(bool with_rows, bool with_factor) {
        const Index n = s.k.n;
        columns_ = s.k.p + (with_rows ? static_cast<Index>(list_.size()) : 0) + (with_factor ? s.k.rank : 0);
        ld_ = padded<P>(columns_);
        Index c = 0;
        auto put = [&](const double* values) {
            for (Index j = 0; j < n; j++) V_[j * ld_ + c] = values[j];
            c++;
        };
        for (Index r = 0; r < s.k.p; r++) put(s.A + r * s.np);
        if (with_rows)
            for (Index r : list_) put(s.G + r * s.np);
        if (with_factor)
            for (Index r = 0; r < s.k.rank; r++) put(s.F + r * s.np);
        for (Index j = 0; j < n; j++)
            for (Index z = columns_; z < ld_; z++) V_[j * ld_ + z] = 0;
    }

    // How many of the columns are rows of the problem; those of F come after them.
    Index own() const { return s.k.p + (how_ == WEIGHED ? 0 : static_cast<Index>(list_.size())); }

    // S = V'V + diag(E), factored in place.
    bool factor_schur() {
        auto all = [](Index) { return Index{0}; };
        gram<P, false>(V_, ld_, s.k.n, columns_, nullptr, 0, S_, ld_, all);
        largest_ = 0;
        for (Index c = 0; c < own(); c++) largest_ = vmax(S_[c * ld_ + c], largest_);
        return cholesky<P>(S_, ld_, E_, S_, ld_, columns_, inv_s_).positive;
    }

    bool factor_diagonal() {
        const Index n = s.k.n;
        bool positive = true;
        gather(true, true);
        for (Index j = 0; j < n; j++) {
            H_[j] = s.diagonal[j] + (s.k.bounded() ? bound_w_[j] : 0.0);
            positive = positive && H_[j] > 0;
            root_h_[j] = std::sqrt(H_[j]);
            const Vec inverse = P::splat(1 / root_h_[j]);
            for (Index v = 0; v < ld_ / W; v++) P::store(V_ + j * ld_ + v * W, P::load(V_ + j * ld_ + v * W) * inverse);
        }
        Index c = 0;
        for (Index r = 0; r < s.k.p; r++) E_[c++] = finer_ * eq_delta_[r] + s.soft;
        for (Index r : list_) E_[c++] = row_e[r] + finer_ * row_delta_[r];
        for (Index r = 0; r < s.k.rank; r++) E_[c++] = 1;
        return positive && factor_schur();
    }

    bool factor_dense() {
        const Index n = s.k.n;
        const bool held = how_ == HELD, soft = s.soft != 0;
        // M = Q + A'A + G'WG + diagonal; A'A changes no solution, and lets Q be singular where A holds x.
        Index count = 0;
        auto put = [&](const double* values, double weight) {
            const Vec root = P::splat(std::sqrt(weight));
            for (Index v = 0; v < s.packs(); v++) P::store(B_ + count * s.np + v * W, P::load(values + v * W) * root);
            count++;
        };
        for (Index r = 0; r < s.k.p; r++) put(s.A + r * s.np, soft ? 1 / s.soft : 1);
        for (Index r : list_) put(s.G + r * s.np, held ? 1 / (1 + row_e[r]) : row_w_[r]);
        for (Index r = 0; r < s.k.rank; r++) put(s.F + r * s.np, 1);
        auto all = [](Index) { return Index{0}; };
        auto factored = [&](double rho) {
            gram<P, false>(B_, s.np, count, n, s.dense() ? s.Q : nullptr, s.np, M_, s.np, all);
            double most = 0;
            for (Index j = 0; j < n; j++) {
                if (!s.dense()) M_[j * s.np + j] += s.diagonal[j];
                most = vmax(M_[j * s.np + j], most);
            }
            // Weights grow without bound near the solution; rho keeps pace with their rounding error.
            if (!held) rho = vmax(ROUNDING * most, rho);
            for (Index j = 0; j < n; j++) extra_[j] = rho + (s.k.bounded() ? bound_w_[j] : 0.0);
            return cholesky<P>(M_, s.np, extra_, M_, s.np, n, inv_m_);
        };
        // (A rho above the curvature in some direction would hide it from the refinement.)
        const auto first = factored(held ? LITTLE : RHO);
        if (held) {
            rho_ = LITTLE;
            if (!first.positive || first.smallest < 1e2 * LITTLE) {
                rho_ = RHO;
                if (!factored(RHO).positive) return false;
            }
        } else if (!first.positive) {
            return false;
        }
        if (soft && !held) return true;  // equalities are weighed like rows
        gather(held, false);
        solve_transposed<P>(M_, s.np, inv_m_, n, V_, ld_, 0, ld_ / W, all);
        Index c = 0;
        for (Index r = 0; r < s.k.p; r++) E_[c++] = finer_ * eq_delta_[r];
        if (held)
            for (Index r : list_) E_[c++] = row_e[r] * (1 + row_e[r]) + finer_ * row_delta_[r];
        return factor_schur();
    }

    // u = (K + R)^-1 r, to the rounding error of the reduction. r is masked.
    void raw(const double* r, double* u) {
        if (how_ == DIAGONAL_FIRST) raw_diagonal(r, u);
        else raw_dense(r, u);
    }

    void raw_diagonal(const double* r, double* u) {
        const Index n = s.k.n, p = s.k.p, packs = ld_ / W;
        const bool bounded = size > at_bound;
        for (Index j = 0; j < n; j++) {
            t_[j] = r[j] + (bounded ? bound_w_[j] * r[at_bound + j] : 0.0);
            u[j] = t_[j];
            t_[j] /= root_h_[j];
        }
        std::fill_n(y_, ld_, 0.0);
        add_transposed<P>(V_, ld_, n, t_, 1, y_, 0, packs);
        Index c = 0;
        for (Index i = 0; i < p; i++) y_[c++] -= r[at_eq + i];
        for (Index i : list_) y_[c++] -= r[at_row + i];
        solve_both<P>(S_, ld_, inv_s_, columns_, y_);
        std::fill_n(Qx_, s.np, 0.0);
        add_product<P>(V_, ld_, n, y_, 1, Qx_, 0, packs);
        std::fill_n(u + at_row, s.mp, 0.0);
        c = 0;
        for (Index i = 0; i < p; i++) u[at_eq + i] = y_[c++];
        for (Index i : list_) u[at_row + i] = y_[c++];
        for (Index j = 0; j < n; j++) {
            const double pull = Qx_[j] * root_h_[j], x = (u[j] - pull) / H_[j];
            u[j] = x;
            if (!bounded) continue;
            // A stiff bound's force comes from stationarity; weight * (x - r) would cancel.
            const double w = bound_w_[j], rest = r[j] - s.diagonal[j] * x - pull;
            u[at_bound + j] = bound_in[j] == 0 ? 0.0 : w > s.diagonal[j] ? rest : w * (x - r[at_bound + j]);
        }
    }

    void raw_dense(const double* r, double* u) {
        const Index n = s.k.n, p = s.k.p, m = s.k.m;
        const bool bounded = size > at_bound, held = how_ == HELD, soft = s.soft != 0 && !held;
        std::copy_n(r, s.np, t_);
        for (Index i = 0; i < p; i++) y_[i] = soft ? r[at_eq + i] / s.soft : r[at_eq + i];
        s.add_pull(y_, t_);
        std::fill_n(u + at_row, s.mp, 0.0);
        for (Index i : list_) u[at_row + i] = (held ? 1 / (1 + row_e[i]) : row_w_[i]) * r[at_row + i];
        add_transposed<P>(s.G, s.np, m, u + at_row, 1, t_, 0, s.packs());
        if (bounded)
            for (Index j = 0; j < n; j++) t_[j] += bound_w_[j] * r[at_bound + j];
        solve_transposed<P>(M_, s.np, inv_m_, n, t_);
        if (!soft) {
            const Index packs = ld_ / W;
            std::fill_n(y_, ld_, 0.0);
            add_transposed<P>(V_, ld_, n, t_, 1, y_, 0, packs);
            Index c = 0;
            for (Index i = 0; i < p; i++) y_[c++] -= r[at_eq + i];
            if (held)
                for (Index i : list_) y_[c++] -= r[at_row + i];
            solve_both<P>(S_, ld_, inv_s_, columns_, y_);
            add_product<P>(V_, ld_, n, y_, -1, t_, 0, packs);
        }
        diffopt::solve<P>(M_, s.np, inv_m_, n, t_);
        std::copy_n(t_, s.np, u);
        if (soft) {
            std::fill_n(y_, s.pp, 0.0);
            add_product<P>(s.A, s.np, p, u, 1, y_, 0, s.packs());
            for (Index i = 0; i < p; i++) u[at_eq + i] = (y_[i] - r[at_eq + i]) / s.soft;
        } else {
            for (Index i = 0; i < p; i++) u[at_eq + i] = y_[i];
        }
        if (held) {
            Index c = p;
            for (Index i : list_) u[at_row + i] = (1 + row_e[i]) * y_[c++];
        } else {
            std::fill_n(u + at_row, s.mp, 0.0);
            add_product<P>(s.G, s.np, m, u, 1, u + at_row, 0, s.packs());
            for (Index i = 0; i < s.mp; i++)
                u[at_row + i] = row_in[i] != 0 ? row_w_[i] * (u[at_row + i] - r[at_row + i]) : 0.0;
        }
        if (!bounded) return;
        if (held) {
            s.times_Q(u, Qx_);
            s.add_pull(u + at_eq, Qx_);
            add_transposed<P>(s.G, s.np, m, u + at_row, 1, Qx_, 0, s.packs());
        }
        for (Index j = 0; j < n; j++) {
            const double w = bound_w_[j], direct = w * (u[j] - r[at_bound + j]);
            u[at_bound + j] = bound_in[j] == 0 ? 0.0 : held && w > 1 ? r[j] - Qx_[j] : direct;
        }
    }
};

}  // namespace diffopt
