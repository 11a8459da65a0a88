// From an active set to its exact point, and the check that this point is the solution.
#pragma once
#include "dual.hpp"
#include "saved.hpp"

namespace diffopt {

// Prepares the system of the rows marked in active_ (equalities and held rows): M = V_B'V_B, factored.
// False where these rows depend on each other; close_: so nearly that a derivative needs more accurate solves. Only M is
// needed for multipliers: x follows from them.
template <class P> typename P::Flag Dual<P>::hold() {
    PROFILE(HOLD, 0);
    Flag enough = none_of(Flag{});
    if constexpr (P::LANES) {
        ldb_ = held_ = k.joint;
        Vec many{};
        for (Index i = 0; i < k.joint; i++) {
            const Vec mine = P::load(active_ + i * P::W);
            many += mine;
            for (Index j = i; j < k.joint; j++) {
                const Vec v = P::load(m_->D + (i * k.joint + j) * P::W) * mine * P::load(active_ + j * P::W);
                P::store(M_ + (i * ldb_ + j) * P::W, i == j ? v + (1.0 - mine) : v);
            }
        }
        // (More rows than variables depend on each other, whatever rounding has made of their pivots.)
        enough = none_of(P::any_entry(many > static_cast<double>(k.n)));
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
        for (Index r = 0; r < k.n; r++) {
            const double* row = m_->V + r * k.joint;
            for (Index i = 0; i < held_; i++) B_[r * ldb_ + i] = row[list_[i]];
            for (Index i = held_; i < ldb_; i++) B_[r * ldb_ + i] = 0;
        }
    }
    for (Index i = 0; i < held_; i++) P::put(compact_, i, P::get(M_, i * ldb_ + i));
    PROFILE_THEN(HOLD_FACTOR, P::S * cube(P::LANES ? k.p + k.m + k.b : held_) / 3);
    const auto pivots = cholesky<P>(M_, ldb_, nullptr, M_, ldb_, held_, inv_m_);
    Number least = Number{} + INF;  // share of a row that the rows before it do not have
    for (Index i = 0; i < held_; i++) {
        const Number inverse = P::get(inv_m_, i);
        least = vmin(1.0 / (inverse * inverse * P::get(compact_, i)), least);
    }
    close_ = none_of(least >= CLOSE);
    return enough & pivots.positive & (pivots.smallest >= DEPENDENT);
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
    PROFILE(CHECK, P::S * (2 * square(k.n) + 4 * product(k.n, k.p + k.m)));
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

// Marks active_ and target_ (equalities, and rows in held_rows_), each variable held at one bound only.
template <class P> void Dual<P>::gather_held() {
    const Index offset = k.pp * P::S;
    clear(active_, k.joint);
    clear(target_, k.joint);
    for (Index i = 0; i < k.p; i++) P::put(active_, i, Number{} + 1.0);
    std::memcpy(target_, b_, bytes(k.pp));
    each_row([&](Index at, Index direction, double sign) {
        double *active = active_ + offset + direction, *target = target_ + offset + direction;
        const Mask held = P::load_mask(held_rows_ + at) & (P::load(active) == 0.0);
        P::store_mask(held_rows_ + at, held);
        P::store(active, select(held, 1.0, P::load(active)));
        P::store(target, select(held, sign * P::load(side_ + at), P::load(target)));
    });
}

// (x_, y_): the point where the held rows hold with equality and the others have no multiplier; then its residuals.
template <class P> void Dual<P>::aim() {
    PROFILE(POLISH_SOLVES, P::S * (square(k.n) + 2 * square(held_) + 2 * product(k.n, held_)));
    for (Index q = 0; q < k.packs(k.joint); q++)
        P::store(y_ + q * P::W, -(P::load(target_ + q * P::W) + P::load(h0_ + q * P::W)));
    solve_held(y_);
    std::memcpy(x_, t_, bytes(k.np));
    add_product<P>(held_matrix(), ldb_, k.n, compact_, 1, x_, 0, k.packs(ldb_));
    solve<P>(m_->U, k.np, m_->inv, k.n, x_);
    for (Index q = 0; q < k.packs(k.np); q++) P::store(x_ + q * P::W, -P::load(x_ + q * P::W));
    residual_of_point();
}

// Changes sides: held rows whose multiplier has the wrong sign, other rows that the point violates. Returns where any
// did; those that are not in `which` only look.
template <class P> typename P::Flag Dual<P>::flip(Flag which) {
    const Index offset = k.pp * P::S;
    Vec highest{}, widest{};
    each_row([&](Index at, Index direction, double sign) {
        highest = vmax(vabs(P::load(y_ + offset + direction)), highest);
        widest = vmax(wide(at, direction, sign), widest);
    });
    const Vec z_error = P::splat(-FLIP * (1.0 + P::max(highest))), s_error = P::splat(FLIP * (1.0 + P::max(widest)));
    const Mask open = P::spread(which);
    Mask any_wrong{};
    each_row([&](Index at, Index direction, double sign) {
        const Mask held = P::load_mask(held_rows_ + at);
        const Vec outside = sign * P::load(Cx_ + offset + direction) - P::load(side_ + at);
        const Mask wrong_z = held & (sign * P::load(y_ + offset + direction) < z_error);
        const Mask wrong_s = on(at) & none_of(held) & (outside > s_error);
        any_wrong |= wrong_z | wrong_s;
        P::store_mask(held_rows_ + at, held ^ (open & (wrong_z | wrong_s)));
    });
    return P::any_entry(any_wrong);
}

// One Newton step on the unreduced conditions of the held rows, for the problems in `which`; then the residuals.
template <class P> void Dual<P>::refine(Flag which) {
    PROFILE(POLISH_SOLVES, P::S * (2 * square(k.n) + 2 * square(held_) + 4 * product(k.n, held_)));
    const Index qn = k.packs(k.np), qj = k.packs(k.joint), qb = k.packs(ldb_), offset = k.pp * P::S;
    // Q dx + B'dy = r_x, B dx = r_B
    for (Index q = 0; q < qn; q++) {
        const Index at = q * P::W;
        P::store(work_ + at, -(P::load(Qx_ + at) + P::load(q_ + at) + P::load(pull_ + at) + P::load(push_ + at)));
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
    add_product<P>(held_matrix(), ldb_, k.n, compact_, -1, work_, 0, qb);
    solve<P>(m_->U, k.np, m_->inv, k.n, work_);
    const Mask open = P::spread(which);
    for (Index q = 0; q < qn; q++)
        P::store(x_ + q * P::W, P::load(x_ + q * P::W) + select(open, P::load(work_ + q * P::W), 0.0));
    for (Index q = 0; q < qj; q++)
        P::store(y_ + q * P::W, P::load(y_ + q * P::W) + select(open, P::load(joint_ + q * P::W), 0.0));
    // Variables at a bound stand on it, to the last bit.
    for (Index q = 0; q < k.packs(k.bp); q++) {
        const Index at = offset + k.mp * P::S + q * P::W;
        P::store(x_ + q * P::W, select(P::load(active_ + at) != 0.0, P::load(target_ + at), P::load(x_ + q * P::W)));
    }
}

// Sets multipliers that are negative by rounding to zero; returns where none is more than that.
template <class P> typename P::Flag Dual<P>::clip_multipliers() {
    Vec lowest = P::splat(INF), highest{};
    each_row([&](Index at, Index direction, double sign) {
        const Mask held = P::load_mask(held_rows_ + at);
        double* entry = y_ + k.pp * P::S + direction;
        const Vec z = sign * P::load(entry);
        lowest = vmin(select(held, z, P::splat(INF)), lowest);
        highest = vmax(select(held, vabs(z), 0.0), highest);
        P::store(entry, select(held & (z < 0.0), 0.0, P::load(entry)));
    });
    return P::min(lowest) >= -SIGN * (1.0 + P::max(highest));
}

// The residuals of diffopt.solution.Residuals at (x_, y_): in original units into errors_, and the worst of these and
// of those in equilibrated units. `inside`: no row is violated by more than rounding.
template <class P> typename P::Number Dual<P>::measure_point(Flag& inside) {
    PROFILE(CHECK_MAXIMA, 0);
    const Index qn = k.packs(k.np), qp = k.packs(k.pp), offset = k.pp * P::S;
    Vec slope_max[2] = {}, slope_size[2] = {}, primal_max[2] = {}, primal_size[2] = {};
    Vec curved{}, linear{}, equal{}, sided{}, outside{}, widest{};
    auto take = [](Vec (&errors)[2], Vec (&sizes)[2], Vec error, Vec size, Vec unit) {
        errors[0] = vmax_nan(error * unit, errors[0]);
        sizes[0] = vmax(size * unit, sizes[0]);
        errors[1] = vmax_nan(error, errors[1]);
        sizes[1] = vmax(size, sizes[1]);
    };
    const Vec cost = P::splat(m_->cost);
    for (Index q = 0; q < qn; q++) {
        const Vec Qx = P::load(Qx_ + q * P::W), slope = P::load(q_ + q * P::W), pull = P::load(pull_ + q * P::W),
                  push = P::load(push_ + q * P::W), x = P::load(x_ + q * P::W);
        take(slope_max, slope_size, vabs(Qx + slope + pull + push),
             vmax(vmax(vabs(Qx), vabs(slope)), vmax(vabs(pull), vabs(push))), 1.0 / (cost * P::load(m_->d + q * P::W)));
        curved += Qx * x;
        linear += slope * x;
    }
    for (Index q = 0; q < qp; q++) {
        const Vec Ax = P::load(Cx_ + q * P::W), b = P::load(b_ + q * P::W);
        take(primal_max, primal_size, vabs(Ax - b), vmax(vabs(Ax), vabs(b)), 1.0 / P::load(m_->eq + q * P::W));
        equal += b * P::load(y_ + q * P::W);
    }
    each_row([&](Index at, Index direction, double sign) {
        const Mask held = P::load_mask(held_rows_ + at);
        const Vec v = select(on(at), sign * P::load(Cx_ + offset + direction), 0.0), side = P::load(side_ + at);
        const bool bound = direction >= k.mp * P::S;
        const Vec unit = bound ? P::load(m_->d + direction - k.mp * P::S) : 1.0 / P::load(m_->rows + direction);
        take(primal_max, primal_size, vmax_nan(v - side, Vec{}), vmax(vabs(v), crossed_side(v, side)), unit);
        outside = vmax_nan(select(held, 0.0, v - side), outside);
        widest = vmax(wide(at, direction, sign), widest);
        sided += select(held, side * sign * P::load(y_ + offset + direction), 0.0);
    });
    inside = P::max(outside) <= SIGN * (1.0 + P::max(widest));
    const Number terms[4] = {P::sum(curved), P::sum(linear), P::sum(equal), P::sum(sided)};
    const Number total = vabs(terms[0] + terms[1] + terms[2] + terms[3]);
    Number largest{}, worst{};
    for (const Number& term : terms) largest = vmax_nan(vabs(term), largest);
    for (int units = 0; units < 2; units++) {
        const Number scale = units ? Number{} + 1.0 : 1.0 / m_->cost;
        const Number primal = P::max(primal_max[units]) / (1.0 + P::max(primal_size[units]));
        const Number dual = P::max(slope_max[units]) / (1.0 + P::max(slope_size[units]));
        const Number gap = total * scale / (1.0 + largest * scale);
        worst = vmax_nan(vmax_nan(primal, dual), vmax_nan(gap, worst));
        for (int lane = 0; lane < P::S && units == 0; lane++) {
            errors_[0][lane] = P::lane(primal, lane);
            errors_[1][lane] = P::lane(dual, lane);
            errors_[2][lane] = P::lane(gap, lane);
        }
    }
    return worst;
}

// Solves for the point where the rows with z > s hold with equality and the others have no multiplier, changing sides
// where signs come out wrong, and accepts it where all signs are right and its residuals, recomputed from the data, are
// at rounding level (at the end of the iteration: within the tolerance). What it accepts is written to `answer`.
// No problem's result may depend on what the others in its group still need.
template <class P>
typename P::Flag Dual<P>::polish(Flag due, Flag at_end, Number steps, const Answer& answer, int rounds) {
    PROFILE(POLISH, 0);
    Flag pending = due, solved{};
    std::memcpy(held_rows_, above_, bytes(rows_));
    for (int round = 0; round < rounds && any(pending); round++) {
        gather_held();
        const Flag independent = hold();
        if (round == 0) dependent_ = pending & none_of(independent);
        pending = pending & independent;
        if (!any(pending)) break;
        aim();
        const Flag wrong = flip(pending);
        const Flag right = pending & none_of(wrong);
        Flag accepted{};
        for (int again = 0; again < 2 && any(right & none_of(accepted)); again++) {
            refine(right & none_of(accepted));
            const Flag signs = clip_multipliers();
            residual_of_point();
            Flag inside;
            const Number worst = measure_point(inside);
            const Flag good = right & signs & inside;
            accepted = accepted | (good & (worst <= ENOUGH));
            if (again == 1) accepted = accepted | (good & at_end & (worst <= options_.tolerance));
        }
        if (any(accepted)) finish(accepted, steps, answer);
        solved = solved | accepted;
        pending = pending & wrong;
    }
    return solved;
}

// Writes accepted problems, and what their pullback needs.
template <class P> void Dual<P>::finish(Flag accepted, Number steps, const Answer& answer) {
    PROFILE(WRITE, 0);
    // Weakly active rows hold with equality and have no multiplier; a derivative leaves them out.
    const Index offset = k.pp * P::S;
    Index weak[P::S] = {};
    bool dropped = false;
    each_row([&](Index at, Index direction, double sign) {
        const Mask here = on(at), held = P::load_mask(held_rows_ + at);
        const Vec slack = P::load(side_ + at) - sign * P::load(Cx_ + offset + direction);
        const Vec z = select(held, sign * P::load(y_ + offset + direction), 0.0);
        const Mask is_weak = here & (held | (slack <= options_.weak_tolerance)) & (z <= options_.weak_tolerance);
        for (int lane = 0; lane < P::S; lane++) weak[lane] += P::count(is_weak, lane);
        const Mask drop = held & is_weak & P::spread(accepted);
        if (any(drop)) {
            dropped = true;
            double* active = active_ + offset + direction;
            P::store(active, select(drop, 0.0, P::load(active)));
        }
    });
    auto each_accepted = [&](auto f) {
        for (int lane = 0; lane < P::S; lane++)
            if (P::lane(accepted, lane) && first_ + lane < batch_.count) f(lane, first_ + lane);
    };
    if (batch_.single) write_points<float>(accepted, answer);
    else write_points<double>(accepted, answer);
    if (batch_.single) {
        // The residuals are those of what is written, which is rounded.
        for (Index j = 0; j < k.np * P::S; j++) x_[j] = static_cast<float>(x_[j]);
        for (Index j = 0; j < k.joint * P::S; j++) y_[j] = static_cast<float>(y_[j]);
        residual_of_point();
        Flag inside;
        measure_point(inside);
    }
    each_accepted([&](int lane, Index i) {
        const double worst = vmax_nan(vmax_nan(errors_[0][lane], errors_[1][lane]), errors_[2][lane]);
        answer.status[i] = graded(options_, worst);
        answer.iterations[i] = static_cast<int64_t>(P::lane(steps + steps_before_, lane));
        answer.weak[i] = weak[lane];
        answer.dependent[i] = answer.status[i] == NUMERICAL_ERROR ? -1 : 0;
        for (int e = 0; e < 3; e++) answer.residuals[e * batch_.count + i] = errors_[e][lane];
    });
    if (!answer.saved) return;
    PROFILE_THEN(RECORD, 0, 8 * P::S * static_cast<double>(answer.saved_stride));
    if (dropped) hold();
    const Flag whole = accepted & none_of(close_);
    if constexpr (P::LANES) keep_lanes(whole, answer);
    else if (whole) keep(answer);
    each_accepted([&](int lane, Index i) {
        if (P::lane(close_, lane)) keep_sides(lane, answer);
        if (answer.status[i] == NUMERICAL_ERROR) answer.saved[first_ * answer.saved_stride + lane] = NO_SOLUTION;
    });
}

template <class P> template <class T> void Dual<P>::write_points(Flag accepted, const Answer& answer) {
    const Vec cost = P::splat(m_->cost);
    const Index offset = k.pp * P::S;
    // Entry r of a vector of `size` numbers is get(address of the entry in a vector of ours).
    auto write = [&](void* target, Index size, auto get) {
        Each<P, T> to;
        for (int lane = 0; lane < P::S; lane++) {
            const Index i = first_ + lane;
            to.problem[lane] = target && P::lane(accepted, lane) && i < batch_.count ? static_cast<T*>(target) + i * size : nullptr;
        }
        if constexpr (P::LANES) {
            from_lanes<P, T>(to, size, [&](Index e) { return get(e * P::W); });
        } else {
            double* const packs = size == k.n ? work_ : joint_;  // (as long as they must be, and free now)
            for (Index q = 0; q < size; q += P::E) P::store(packs + q, get(q));
            for (Index e = 0; to[0] && e < size; e++) to[0][e] = static_cast<T>(packs[e]);
        }
    };
    write(answer.x, k.n, [&](Index at) { return P::load(x_ + at) * P::load(m_->d + at); });
    write(answer.nu, k.p, [&](Index at) { return P::load(y_ + at) * P::load(m_->eq + at) / cost; });
    write(answer.lam, k.m, [&](Index at) { return P::load(y_ + offset + at) * P::load(m_->rows + at) / cost; });
    write(answer.s, k.m, [&](Index at) {
        const Vec slack = P::load(side_ + at) - P::load(Cx_ + offset + at);
        const Mask none = P::load_mask(held_rows_ + at) | (slack < 0.0);
        return select(on(at), select(none, 0.0, slack / P::load(m_->rows + at)), P::splat(INF));
    });
    auto force = [&](Index at) { return P::load(y_ + offset + k.mp * P::S + at) / (cost * P::load(m_->d + at)); };
    write(answer.lower, k.n, [&](Index at) { return k.b ? select(force(at) < 0.0, -force(at), 0.0) : Vec{}; });
    write(answer.upper, k.n, [&](Index at) { return k.b ? select(force(at) > 0.0, force(at), 0.0) : Vec{}; });
}

// Writes what the pullback needs of the accepted problems; see saved.hpp.
template <class P> void Dual<P>::keep_lanes(Flag accepted, const Answer& answer) {
    Small<P> record(batch_, answer, first_);
    const Mask open = P::spread(accepted);
    auto put = [&](double* to, const double* from, Index size) {
        for (Index i = 0; i < size * P::S; i += P::W)
            P::store(to + i, select(open, P::load(from + i), P::load(to + i)));
    };
    P::store(record.kind, select(open, P::splat(IN_LANES), P::load(record.kind)));
    P::store(record.cost, select(open, P::splat(m_->cost), P::load(record.cost)));
    put(record.d, m_->d, k.n), put(record.eq, m_->eq, k.p), put(record.rows, m_->rows, k.m);
    put(record.held, active_, k.joint);
    for (Index j = 0; lower_ != upper_ && j < k.n; j++) {
        double* at = record.held + (k.pp + k.mp + j) * P::S;
        const Mask lower = open & P::load_mask(held_rows_ + (lower_ + j) * P::S) & (P::load(at) != 0.0);
        P::store(at, select(lower, -1.0, P::load(at)));
    }
    put(record.inv, m_->inv, k.n), put(record.inv_m, inv_m_, k.joint), put(record.M, M_, k.joint * k.joint);
    if (kept_ || matrices_shared(batch_)) return;
    std::memcpy(record.U, m_->U, bytes(k.n * k.n));
    std::memcpy(record.V, m_->V, bytes(k.n * k.joint));
    kept_ = true;
}

// Of one problem only the active set: its pullback goes by the general method, which refines.
template <class P> void Dual<P>::keep_sides(int lane, const Answer& answer) {
    const Sides record(batch_, answer.saved + first_ * answer.saved_stride + lane, P::S);
    auto entry = [lane](const double* v, Index i) { return v[i * P::S + lane]; };
    record.start(P::lane(m_->cost, lane), batch_.hessian != DENSE);
    for (Index j = 0; j < k.n; j++) record.d[j] = entry(m_->d, j);
    for (Index r = 0; r < k.p; r++) record.eq[r] = entry(m_->eq, r);
    for (Index r = 0; r < k.m; r++) record.rows[r] = entry(m_->rows, r), record.row[r] = entry(active_, k.pp + r);
    for (Index j = 0; j < k.n; j++) {
        const bool held = k.b && entry(active_, k.pp + k.mp + j) != 0;
        const bool low = held && lower_ != upper_ &&
                         reinterpret_cast<const int64_t*>(held_rows_)[(lower_ + j) * P::S + lane] != 0;
        record.bound[j] = !held ? FREE : low ? AT_LOWER : AT_UPPER;
    }
}

template <class P> void Dual<P>::keep(const Answer& answer) {
    Saved saved(batch_, answer, first_);
    saved.start(held_, m_->cost);
    for (Index r = 0; r < k.n; r++) saved.d[r] = m_->d[r];
    for (Index r = 0; r < k.p; r++) saved.eq[r] = m_->eq[r];
    for (Index r = 0; r < k.m; r++) saved.rows[r] = m_->rows[r];
    for (Index i = 0; i < held_; i++) {
        // Held rows by their place in [A; G; I]; a lower bound's is marked by its sign.
        const Index j = list_[i];
        double place = static_cast<double>(j < k.pp ? j : j < k.pp + k.mp ? k.p + (j - k.pp) : k.p + k.m + (j - k.pp - k.mp));
        if (j >= k.pp + k.mp && lower_ != upper_) {
            const Index row = lower_ + (j - k.pp - k.mp);
            if (reinterpret_cast<const int64_t*>(held_rows_)[row] != 0) place = -1 - place;
        }
        saved.held[i] = place;
    }
    if (!saved.shared) keep_factor(m_->U, k.np, k.n, saved.U);
    std::copy_n(B_, k.n * ldb_, saved.V);
    keep_factor(M_, ldb_, held_, saved.M);
}

}  // namespace diffopt
