// From an active set to its exact point, and the check that this point is the solution.
#pragma once
#include "dual.hpp"
#include "saved.hpp"

namespace diffopt {

// Prepares the system of the rows marked in active_ (equalities and held rows): M = V_B'V_B, factored.
// False where these rows depend on each other. Only M is needed for multipliers: x follows from them.
template <class P> typename P::Flag Dual<P>::hold(bool keep_rows) {
    if constexpr (P::LANES) {
        (void)keep_rows;
        ldb_ = held_ = k.joint;
        for (Index i = 0; i < k.joint; i++) {
            const Vec mine = P::load(active_ + i * P::W);
            for (Index j = i; j < k.joint; j++) {
                const Vec v = P::load(m_->D + (i * k.joint + j) * P::W) * mine * P::load(active_ + j * P::W);
                P::store(M_ + (i * ldb_ + j) * P::W, i == j ? v + (1.0 - mine) : v);
            }
        }
    } else {
        list_.clear();
        for (Index i = 0; i < k.joint; i++)
            if (active_[i] != 0) list_.push_back(i);
        held_ = static_cast<Index>(list_.size());
        if (held_ > k.n) return false;
        ldb_ = padded<P>(held_);
        for (Index i = 0; i < held_; i++) {
            const double* row = m_->D + list_[i] * k.joint;
            for (Index j = i; j < held_; j++) M_[i * ldb_ + j] = row[list_[j]];
            for (Index j = held_; j < ldb_; j++) M_[i * ldb_ + j] = 0;
        }
        if (keep_rows)
            for (Index r = 0; r < k.n; r++) {
                const double* row = m_->V + r * k.joint;
                for (Index i = 0; i < held_; i++) B_[r * ldb_ + i] = row[list_[i]];
                for (Index i = held_; i < ldb_; i++) B_[r * ldb_ + i] = 0;
            }
    }
    const auto pivots = cholesky<P>(M_, ldb_, nullptr, M_, ldb_, held_, inv_m_);
    return pivots.positive & (pivots.smallest >= DEPENDENT);
}

// right (joint) <- the solution y of M y = right over the held rows, zero elsewhere; compact_ holds it too.
template <class P> void Dual<P>::solve_held(double* right) {
    if constexpr (P::LANES) {
        for (Index i = 0; i < k.joint; i++) P::store(right + i * P::W, P::load(right + i * P::W) * P::load(active_ + i * P::W));
        solve_both<P>(M_, ldb_, inv_m_, held_, right);
        std::memcpy(compact_, right, bytes(k.joint));
    } else {
        for (Index i = 0; i < held_; i++) compact_[i] = right[list_[i]];
        for (Index i = held_; i < ldb_; i++) compact_[i] = 0;
        solve_both<P>(M_, ldb_, inv_m_, held_, compact_);
        clear(right, k.joint);
        for (Index i = 0; i < held_; i++) right[list_[i]] = compact_[i];
    }
}

// Qx_, pull_ = A'nu, push_ = G'lam + bound forces, Cx_ = [A; G; I] x at (x_, y_).
template <class P> void Dual<P>::residual_of_point() {
    const Index ldc = k.pp + k.mp, qp = k.packs(k.pp), qc = k.packs(ldc);
    clear(Qx_, k.np);
    clear(pull_, k.np);
    clear(push_, k.np);
    clear(Cx_, k.joint);
    add_product<P>(m_->Q, k.np, k.n, x_, 1, Qx_, 0, k.packs(k.np));
    if (k.p) add_product<P>(m_->C, ldc, k.n, y_, 1, pull_, 0, qp);
    if (k.m) add_product<P>(m_->C, ldc, k.n, y_, 1, push_, qp, qc);
    add_transposed<P>(m_->C, ldc, k.n, x_, 1, Cx_, 0, qc);
    for (Index q = 0; q < k.packs(k.bp); q++) {
        P::store(push_ + q * P::W, P::load(push_ + q * P::W) + P::load(y_ + ldc * P::S + q * P::W));
        P::store(Cx_ + ldc * P::S + q * P::W, P::load(x_ + q * P::W));
    }
}

// Solves for the point where the rows with z > s hold with equality and the others have no multiplier, and accepts it
// where all signs are right and its residuals, recomputed from the data, are at rounding level (at the end of the
// iteration: within the tolerance). Accepted problems are written to `answer`.
template <class P>
typename P::Flag Dual<P>::polish(Flag due, Flag at_end, int64_t step, const Answer& answer) {
    const Index qn = k.packs(k.np), qp = k.packs(k.pp), qj = k.packs(k.joint), offset = k.pp * P::S;
    clear(active_, k.joint);
    clear(target_, k.joint);
    for (Index i = 0; i < k.p; i++) P::put(active_, i, Number{} + 1.0);
    std::memcpy(target_, b_, bytes(k.pp));
    Vec widest{};
    each_row([&](Index at, Index direction, double sign) {
        // A variable is held once, at its lower bound if both seem active.
        const Mask above = P::load_mask(above_ + at) & (P::load(active_ + offset + direction) == 0.0);
        const Vec side = P::load(side_ + at);
        P::store(active_ + offset + direction, select(above, 1.0, P::load(active_ + offset + direction)));
        P::store(target_ + offset + direction, select(above, sign * side, P::load(target_ + offset + direction)));
        // (Only where it is asked for: a neighbour's polish must leave no trace.)
        P::store_mask(above_ + at, (P::spread(due) & above) | (none_of(P::spread(due)) & P::load_mask(above_ + at)));
        widest = vmax(vabs(side), widest);
    });
    Flag good = due & hold(true);
    if (!any(good)) return good;

    for (Index q = 0; q < qj; q++) P::store(y_ + q * P::W, -(P::load(target_ + q * P::W) + P::load(h0_ + q * P::W)));
    solve_held(y_);
    const double* B = P::LANES ? m_->V : B_;
    const Index ldb = ldb_, qb = k.packs(ldb_);
    std::memcpy(x_, t_, bytes(k.np));
    add_product<P>(B, ldb, k.n, compact_, 1, x_, 0, qb);
    solve<P>(m_->U, k.np, m_->inv, k.n, x_);
    for (Index q = 0; q < qn; q++) P::store(x_ + q * P::W, -P::load(x_ + q * P::W));
    residual_of_point();

    const Number slack_error = SIGN * (1.0 + P::max(widest));
    double errors[3][P::S] = {};
    Flag accepted{};
    for (int round = 0; round < 2; round++) {
        // Q dx + B'dy = r_x, B dx = r_B
        for (Index q = 0; q < qn; q++) {
            const Vec slope = P::load(Qx_ + q * P::W) + P::load(q_ + q * P::W) + P::load(pull_ + q * P::W) + P::load(push_ + q * P::W);
            P::store(work_ + q * P::W, -slope);
        }
        solve_transposed<P>(m_->U, k.np, m_->inv, k.n, work_);
        for (Index q = 0; q < qj; q++) P::store(joint_ + q * P::W, P::load(Cx_ + q * P::W) - P::load(target_ + q * P::W));
        if constexpr (P::LANES) {
            add_transposed<P>(m_->V, k.joint, k.n, work_, 1, joint_, 0, qj);
        } else {
            clear(compact_, ldb_);
            add_transposed<P>(B_, ldb_, k.n, work_, 1, compact_, 0, qb);
            for (Index i = 0; i < held_; i++) joint_[list_[i]] += compact_[i];
        }
        solve_held(joint_);
        add_product<P>(B, ldb, k.n, compact_, -1, work_, 0, qb);
        solve<P>(m_->U, k.np, m_->inv, k.n, work_);
        // What was accepted in the first round stays as it is, whatever its neighbours still need.
        const Mask open = none_of(P::spread(accepted));
        for (Index q = 0; q < qn; q++) P::store(x_ + q * P::W, P::load(x_ + q * P::W) + select(open, P::load(work_ + q * P::W), 0.0));
        for (Index q = 0; q < qj; q++) P::store(y_ + q * P::W, P::load(y_ + q * P::W) + select(open, P::load(joint_ + q * P::W), 0.0));
        // Variables at a bound stand on it, to the last bit.
        for (Index q = 0; q < k.packs(k.bp); q++) {
            const Index at = offset + k.mp * P::S + q * P::W;
            P::store(x_ + q * P::W, select(P::load(active_ + at) != 0.0, P::load(target_ + at), P::load(x_ + q * P::W)));
        }

        // Multipliers: at least zero, up to rounding.
        Vec lowest = P::splat(INF), highest{};
        each_row([&](Index at, Index direction, double sign) {
            const Mask above = P::load_mask(above_ + at);
            double* entry = y_ + offset + direction;
            const Vec z = sign * P::load(entry);
            lowest = vmin(select(above, z, P::splat(INF)), lowest);
            highest = vmax(select(above, vabs(z), 0.0), highest);
            P::store(entry, select(above & (z < 0.0), 0.0, P::load(entry)));
        });
        good = good & (P::min(lowest) >= -SIGN * (1.0 + P::max(highest)));
        if (!any(good)) return Flag{};
        residual_of_point();

        // The residuals of diffopt.solution.Residuals, in the original units and in the equilibrated ones.
        Vec slope_max[2] = {}, slope_size[2] = {}, primal_max[2] = {}, primal_size[2] = {};
        Vec curved{}, linear{}, equal{}, sided{}, outside{};
        const Vec cost = P::splat(m_->cost);
        for (Index q = 0; q < qn; q++) {
            const Vec Qx = P::load(Qx_ + q * P::W), linear_q = P::load(q_ + q * P::W), pull = P::load(pull_ + q * P::W),
                      push = P::load(push_ + q * P::W), x = P::load(x_ + q * P::W);
            const Vec error = vabs(Qx + linear_q + pull + push);
            const Vec most = vmax(vmax(vabs(Qx), vabs(linear_q)), vmax(vabs(pull), vabs(push)));
            const Vec unit = 1.0 / (cost * P::load(m_->d + q * P::W));
            slope_max[0] = vmax_nan(error * unit, slope_max[0]);
            slope_size[0] = vmax(most * unit, slope_size[0]);
            slope_max[1] = vmax_nan(error, slope_max[1]);
            slope_size[1] = vmax(most, slope_size[1]);
            curved += Qx * x;
            linear += linear_q * x;
        }
        for (Index q = 0; q < qp; q++) {
            const Vec Ax = P::load(Cx_ + q * P::W), b = P::load(b_ + q * P::W), unit = 1.0 / P::load(m_->eq + q * P::W);
            const Vec error = vabs(Ax - b), most = vmax(vabs(Ax), vabs(b));
            primal_max[0] = vmax_nan(error * unit, primal_max[0]);
            primal_size[0] = vmax(most * unit, primal_size[0]);
            primal_max[1] = vmax_nan(error, primal_max[1]);
            primal_size[1] = vmax(most, primal_size[1]);
            equal += b * P::load(y_ + q * P::W);
        }
        each_row([&](Index at, Index direction, double sign) {
            const Mask here = on(at), above = P::load_mask(above_ + at);
            const Vec v = select(here, sign * P::load(Cx_ + offset + direction), 0.0), side = P::load(side_ + at);
            const bool bound = direction >= k.mp * P::S;
            const Vec unit = bound ? P::load(m_->d + direction - k.mp * P::S) : 1.0 / P::load(m_->rows + direction);
            const Vec error = vmax_nan(v - side, P::splat(0.0)), most = vmax(vabs(v), vabs(side));
            primal_max[0] = vmax_nan(error * unit, primal_max[0]);
            primal_size[0] = vmax(most * unit, primal_size[0]);
            primal_max[1] = vmax_nan(error, primal_max[1]);
            primal_size[1] = vmax(most, primal_size[1]);
            outside = vmax_nan(select(above, 0.0, v - side), outside);
            sided += select(above, side * sign * P::load(y_ + offset + direction), 0.0);
        });
        const Number terms[4] = {P::sum(curved), P::sum(linear), P::sum(equal), P::sum(sided)};
        Number total = terms[0] + terms[1] + terms[2] + terms[3], largest{};
        for (const Number& term : terms) largest = vmax_nan(vabs(term), largest);
        Number worst{};
        for (int units = 0; units < 2; units++) {
            const Number scale = units ? Number{} + 1.0 : 1.0 / m_->cost;
            const Number primal = P::max(primal_max[units]) / (1.0 + P::max(primal_size[units]));
            const Number dual = P::max(slope_max[units]) / (1.0 + P::max(slope_size[units]));
            const Number gap = vabs(total) * scale / (1.0 + largest * scale);
            worst = vmax_nan(vmax_nan(primal, dual), vmax_nan(gap, worst));
            if (units == 0)
                for (int lane = 0; lane < P::S; lane++) {
                    errors[0][lane] = P::lane(primal, lane);
                    errors[1][lane] = P::lane(dual, lane);
                    errors[2][lane] = P::lane(gap, lane);
                }
        }
        good = good & (P::max(outside) <= slack_error);
        accepted = good & (worst <= ENOUGH);
        if (round == 1) accepted = good & ((worst <= ENOUGH) | (at_end & (worst <= options_.tolerance)));
        if (!any(good & none_of(accepted))) break;
    }
    if (!any(accepted)) return accepted;

    // Weakly active rows hold with equality and have no multiplier; a derivative leaves them out.
    Index weak[P::S] = {};
    bool dropped = false;
    each_row([&](Index at, Index direction, double sign) {
        const Mask here = on(at), above = P::load_mask(above_ + at);
        const Vec slack = P::load(side_ + at) - sign * P::load(Cx_ + offset + direction);
        const Vec z = select(above, sign * P::load(y_ + offset + direction), 0.0);
        const Mask is_weak = here & (above | (slack <= options_.weak_tolerance)) & (z <= options_.weak_tolerance);
        for (int lane = 0; lane < P::S; lane++) weak[lane] += P::count(is_weak, lane);
        const Mask drop = above & is_weak & P::spread(accepted);
        if (any(drop)) {
            dropped = true;
            P::store(active_ + offset + direction, select(drop, 0.0, P::load(active_ + offset + direction)));
        }
    });
    for (int lane = 0; lane < P::S; lane++)
        if (P::lane(accepted, lane) && first_ + lane < batch_.count) {
            const double own[3] = {errors[0][lane], errors[1][lane], errors[2][lane]};
            write(lane, step, own, weak[lane], answer);
        }
    if (answer.saved) {
        if (dropped) hold(true);
        for (int lane = 0; lane < P::S; lane++)
            if (P::lane(accepted, lane) && first_ + lane < batch_.count) keep(lane, answer);
    }
    return accepted;
}

template <class P>
void Dual<P>::write(int lane, int64_t step, const double* errors, Index weak, const Answer& answer) {
    const Index i = first_ + lane;
    if (batch_.single) write_point<float>(lane, answer);
    else write_point<double>(lane, answer);
    answer.status[i] = SOLVED;
    answer.iterations[i] = step;
    answer.weak[i] = weak;
    answer.dependent[i] = 0;
    for (int e = 0; e < 3; e++) answer.residuals[e * batch_.count + i] = errors[e];
}

template <class P> template <class T> void Dual<P>::write_point(int lane, const Answer& answer) const {
    const Index i = first_ + lane;
    const double cost = P::lane(m_->cost, lane);
    auto entry = [&](const double* v, Index r) { return v[r * P::S + lane]; };
    T* x = static_cast<T*>(answer.x) + i * k.n;
    for (Index r = 0; r < k.n; r++) x[r] = static_cast<T>(entry(x_, r) * entry(m_->d, r));
    T* nu = static_cast<T*>(answer.nu) + i * k.p;
    for (Index r = 0; r < k.p; r++) nu[r] = static_cast<T>(entry(y_, r) * entry(m_->eq, r) / cost);
    T *lam = static_cast<T*>(answer.lam) + i * k.m, *s = static_cast<T*>(answer.s) + i * k.m;
    for (Index r = 0; r < k.m; r++) {
        const double unit = entry(m_->rows, r), z = entry(y_, k.pp + r);
        const bool here = (reinterpret_cast<const int64_t*>(on_)[r * P::S + lane]) != 0;
        const bool above = (reinterpret_cast<const int64_t*>(above_)[r * P::S + lane]) != 0;
        const double slack = entry(side_, r) - entry(Cx_, k.pp + r);
        lam[r] = static_cast<T>(z * unit / cost);
        s[r] = static_cast<T>(!here ? INF : above || slack < 0 ? 0.0 : slack / unit);
    }
    T *lower = static_cast<T*>(answer.lower) + i * k.n, *upper = static_cast<T*>(answer.upper) + i * k.n;
    for (Index r = 0; r < k.n; r++) {
        const double force = k.b ? entry(y_, k.pp + k.mp + r) / (cost * entry(m_->d, r)) : 0.0;
        lower[r] = static_cast<T>(force < 0 ? -force : 0.0);
        upper[r] = static_cast<T>(force > 0 ? force : 0.0);
    }
}

// Writes what the pullback needs; see saved.hpp.
template <class P> void Dual<P>::keep(int lane, const Answer& answer) {
    Saved saved(batch_, answer, first_ + lane);
    auto entry = [&](const double* v, Index r) { return v[r * P::S + lane]; };
    std::vector<Index> held;
    for (Index i = 0; i < k.joint; i++)
        if (entry(active_, i) != 0) held.push_back(i);
    const Index count = static_cast<Index>(held.size());
    saved.start(count, P::lane(m_->cost, lane));
    for (Index r = 0; r < k.n; r++) saved.d[r] = entry(m_->d, r);
    for (Index r = 0; r < k.p; r++) saved.eq[r] = entry(m_->eq, r);
    for (Index r = 0; r < k.m; r++) saved.rows[r] = entry(m_->rows, r);
    for (Index i = 0; i < count; i++) {
        // Held rows by their place in [A; G; I]; a lower bound's is marked by its sign.
        const Index j = held[i];
        double place = static_cast<double>(j < k.pp ? j : j < k.pp + k.mp ? k.p + (j - k.pp) : k.p + k.m + (j - k.pp - k.mp));
        if (j >= k.pp + k.mp && lower_ != upper_) {
            const Index row = lower_ + (j - k.pp - k.mp);
            if (reinterpret_cast<const int64_t*>(above_)[row * P::S + lane] != 0) place = -1 - place;
        }
        saved.held[i] = place;
    }
    if (!saved.shared) keep_factor<P>(m_->U, k.np, k.n, lane, saved.U);
    const Index ld = saved.ld;
    for (Index r = 0; r < k.n; r++) {
        double* row = saved.V + r * ld;
        for (Index i = 0; i < count; i++) row[i] = m_->V[(r * k.joint + held[i]) * P::S + lane];
        for (Index i = count; i < ld; i++) row[i] = 0;
    }
    for (Index r = 0; r < count; r++) {
        const Index at = P::LANES ? held[r] : r;
        for (Index i = r / W * W; i < ld; i++)
            saved.M[r * ld + i] = i < r || i >= count ? 0.0 : M_[(at * ldb_ + (P::LANES ? held[i] : i)) * P::S + lane];
    }
}

}  // namespace diffopt
