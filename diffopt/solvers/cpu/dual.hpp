// The interior-point method in dual form: x, nu and Q are eliminated once, and the iteration knows only directions.
//
// With forces f (the sum of sign * z over the rows of a direction) the minimiser under these forces is at
// u(f) = u0 - R f, in terms of what the constraints measure, so stationarity and equalities hold exactly throughout.
// A Newton step on  sign u + s = side,  s z = tau  is one solve with R + diag(1/w), w the sum of z/s over a direction.
#pragma once
#include "cone.hpp"
#include "setup.hpp"

namespace diffopt {

constexpr double FLIP = 1e-8;     // relative size of a wrong sign, before refinement, for which a row changes sides
constexpr double SHIFT = 1e-10;   // keeps R + diag(1/w) definite where active rows depend on each other
constexpr double OFF = 1e30;      // 1/w of a direction without rows: it does not move

template <class P> class Dual {
  public:
    using Vec = typename P::Vec;
    using Mask = typename P::Mask;
    using Number = typename P::Number;
    using Flag = typename P::Flag;

    // Constraint rows of one kind: at which entries of row vectors, which directions they measure, with which sign.
    struct Section {
        Index row, direction, packs;
        double sign;
    };

    Dual(const Batch& batch, const Options& options) : batch_(batch), options_(options), k(batch) {
        auto add = [&](Index direction, Index size, double sign) {
            if (size) sections_[count_++] = {rows_, direction, k.packs(size), sign};
            rows_ += size;
        };
        add(0, k.mp, 1);
        lower_ = rows_;
        add(k.mp, batch.has(FIELD_LOWER) ? k.bp : 0, -1);
        upper_ = rows_;
        add(k.mp, batch.has(FIELD_UPPER) ? k.bp : 0, 1);
        two_sided_ = batch.has(FIELD_LOWER) && batch.has(FIELD_UPPER);
    }

    void plan(Arena& arena) {
        const Index S = P::S;
        for (double** v : {&q_, &x_, &t_, &work_, &Qx_, &pull_, &push_}) *v = arena.take(k.np * S);
        for (double** v : {&b_, &nu0_}) *v = arena.take(k.pp * S);
        for (double** v : {&h0_, &y_, &target_, &joint_, &Cx_, &active_}) *v = arena.take(k.joint * S);
        for (double** v : {&u0_, &u_, &f_, &df_, &inverse_w_, &g_, &extra_}) *v = arena.take(k.directions * S);
        for (double** v : {&s_, &z_, &side_, &on_, &above_, &held_rows_, &r_, &ratio_, &weight_, &inverse_s_, &inverse_z_, &ds_, &dz_}) *v = arena.take(rows_ * S);
        K_ = arena.take(k.directions * k.directions * S);
        inv_k_ = arena.take(k.directions * S);
        const Index most = P::LANES ? k.joint : padded<P>(k.n);
        ldb_ = most;
        B_ = P::LANES ? nullptr : arena.take(k.n * most);
        M_ = arena.take(most * most * S);
        inv_m_ = arena.take(most * S);
        compact_ = arena.take(most * S);
    }

    // Solves the problems that start at `first`; those solved are written to `answer`. Returns how many were not.
    Index run(const Setup<P>& setup, Index first, const Answer& answer) {
        PROFILE(VECTORS, P::S * 2 * product(k.n, k.n / 2 + k.p + k.m + k.b));
        m_ = &setup;
        first_ = first;
        kept_ = false;
        if (batch_.single) read<float>();
        else read<double>();
        prepare();
        steps_before_ = Number{};
        Flag open = sound_;
        if (batch_.start.given()) open = open & none_of(begin_near(answer));
        if (any(open)) {
            start();
            iterate(open, options_.max_iterations, answer);
        }
        Index missing = 0;
        for (int lane = 0; lane < P::S; lane++)
            if (first_ + lane < batch_.count && answer.status[first_ + lane] != SOLVED) missing++;
        return missing;
    }

  private:
    const Batch& batch_;
    const Options& options_;
    Shape<P> k;
    const Setup<P>* m_ = nullptr;
    Index first_ = 0;
    Section sections_[3] = {};
    int count_ = 0;
    Index rows_ = 0, lower_ = 0, upper_ = 0;
    bool two_sided_ = false;
    bool kept_ = false;  // U and V are in the record
    Flag sound_{};
    Number total_{}, objective_{};  // rows that exist; q'Q^-1 q, the size of the objective
    Number steps_before_{};         // steps that an earlier solution has cost in vain
    Flag close_{};                  // the rows held last nearly depend on each other
    Flag dependent_{};              // the first active set that the last polish tried holds rows that depend on each other

    double *q_, *x_, *t_, *work_, *Qx_, *pull_, *push_;
    double *b_, *nu0_;
    double *h0_, *y_, *target_, *joint_, *Cx_, *active_;
    double *u0_, *u_, *f_, *df_, *inverse_w_, *g_, *extra_;
    double *s_, *z_, *side_, *on_, *above_, *held_rows_, *r_, *ratio_, *weight_, *inverse_s_, *inverse_z_, *ds_, *dz_;
    double errors_[3][P::S] = {};  // primal, dual and gap of the point at hand
    double *K_, *inv_k_, *B_, *M_, *inv_m_, *compact_;
    Index ldb_ = 0, held_ = 0;  // row length of B and M; Single: how many rows are held
    std::vector<Index> list_;   // Single: joint indices of the held rows

    template <class F> INLINE void each_row(const F& f) const {
        for (int i = 0; i < count_; i++) {
            const Section c = sections_[i];
            const Index row = c.row * P::S, direction = c.direction * P::S;
            for (Index q = 0; q < c.packs; q++) f(row + q * P::W, direction + q * P::W, c.sign);
        }
    }
    INLINE Mask on(Index at) const { return P::load_mask(on_ + at); }
    // What the side of a row counts for where the signs of slacks are read: held, or violated.
    INLINE Vec wide(Index at, Index direction, double sign) const {
        const Vec side = P::load(side_ + at), value = sign * P::load(Cx_ + k.pp * P::S + direction);
        return select(P::load_mask(held_rows_ + at), vabs(side), crossed_side(value, side));
    }

    // ---- data ------------------------------------------------------------------------------------------------

    template <class T> void read() {
        auto copy = [&](Field field, Index size, double* target) {
            if (!batch_.has(field)) return;
            const Each<P, const T> from = each<P, T>(batch_, field, first_);
            if constexpr (P::LANES) to_lanes<P, T>(from, size, [&](Index e, Vec v) { P::store(target + e * P::W, v); });
            else std::copy_n(from[0], size, target);
        };
        copy(FIELD_q, k.n, q_);
        copy(FIELD_b, k.p, b_);
        copy(FIELD_h, k.m, side_);
        copy(FIELD_LOWER, k.n, side_ + lower_ * P::S);
        copy(FIELD_UPPER, k.n, side_ + upper_ * P::S);
        Vec bad{};  // stays zero only if nothing is infinite or NaN
        for (Index v = 0; v < k.packs(k.np); v++) {
            const Vec x = P::load(q_ + v * P::W);
            bad += x * 0.0;
            P::store(q_ + v * P::W, x * P::load(m_->d + v * P::W) * P::splat(m_->cost));
        }
        for (Index v = 0; v < k.packs(k.pp); v++) {
            const Vec x = P::load(b_ + v * P::W);
            bad += x * 0.0;
            P::store(b_ + v * P::W, x * P::load(m_->eq + v * P::W));
        }
        sound_ = m_->sound & (P::sum(bad) == 0.0);
        // An infinite side is no row, unless it is infinite the wrong way; lower >= upper is for another method.
        Mask wrong{};
        if (two_sided_)
            for (Index v = 0; v < k.packs(k.bp); v++)
                wrong |= P::inside(v * P::E, k.n) & none_of(P::load(side_ + lower_ * P::S + v * P::W) <
                                                            P::load(side_ + upper_ * P::S + v * P::W));
        Vec many{};
        each_row([&](Index at, Index direction, double sign) {
            const bool bound = direction >= k.mp * P::S;
            const Index entry = (direction - (bound ? k.mp * P::S : 0)) / P::S;
            const Vec unit = bound ? P::load(m_->d + entry * P::S) : 1.0 / P::load(m_->rows + entry * P::S);
            const Vec side = P::load(side_ + at) * sign;
            const Mask real = P::inside(entry, bound ? k.n : k.m);
            const Mask here = real & (side < INF);
            wrong |= real & none_of(side > -INF);  // NaN too
            P::store_mask(on_ + at, here);
            P::store(side_ + at, select(here, side / unit, 0.0));
            P::store_mask(above_ + at, Mask{});
            many += select(here, P::splat(1.0), 0.0);
        });
        sound_ = sound_ & none_of(P::any_entry(wrong));
        total_ = P::sum(many);
    }

    // ---- the iteration ---------------------------------------------------------------------------------------

    // What does not depend on forces: u0, nu0, h0, t.
    void prepare() {
        const Index qn = k.packs(k.np), qj = k.packs(k.joint), qd = k.packs(k.directions);
        std::memcpy(t_, q_, bytes(k.np));
        solve_transposed<P>(m_->U, k.np, m_->inv, k.n, t_);
        Vec acc{};
        for (Index q = 0; q < qn; q++) acc += P::load(t_ + q * P::W) * P::load(t_ + q * P::W);
        objective_ = P::sum(acc);
        clear(h0_, k.joint);
        add_transposed<P>(m_->V, k.joint, k.n, t_, 1, h0_, 0, qj);
        const double* h0_c = h0_ + k.pp * P::S;
        for (Index q = 0; q < qd; q++) P::store(u0_ + q * P::W, -P::load(h0_c + q * P::W));
        if (k.p) {
            for (Index q = 0; q < k.packs(k.pp); q++) P::store(nu0_ + q * P::W, P::load(b_ + q * P::W) + P::load(h0_ + q * P::W));
            solve_transposed<P>(m_->E, k.pp, m_->inv_e, k.p, nu0_);
            add_transposed<P>(m_->H, k.directions, k.p, nu0_, 1, u0_, 0, qd);
        }
    }

    void start() {
        PROFILE_THEN(START, P::S * (cube(k.m + k.b) / 3 + 4 * square(k.m + k.b)));
        const Index qd = k.packs(k.directions);
        // The minimiser of the objective plus 1/2 |C x - side|^2 / weight over all rows, weight 1 unless far away.
        for (Index q = 0; q < qd; q++) {
            P::store(inverse_w_ + q * P::W, Vec{});
            P::store(g_ + q * P::W, Vec{});
        }
        each_row([&](Index at, Index direction, double sign) {
            const Vec side = P::load(side_ + at), weight = far_weight(side), share = select(on(at), 1.0 / weight, 0.0);
            P::store(ratio_ + at, weight);
            P::store(inverse_w_ + direction, P::load(inverse_w_ + direction) + share);
            P::store(g_ + direction, P::load(g_ + direction) + sign * side * share);
        });
        for (Index q = 0; q < qd; q++) {
            const Vec w = P::load(inverse_w_ + q * P::W), inverse = select(w > 0.0, 1.0 / w, P::splat(OFF));
            P::store(inverse_w_ + q * P::W, inverse);
            P::store(extra_ + q * P::W, inverse + SHIFT);
            P::store(f_ + q * P::W, select(w > 0.0, P::load(u0_ + q * P::W) - P::load(g_ + q * P::W) * inverse, 0.0));
        }
        if (k.directions) {
            auto pivots = cholesky<P>(m_->R, k.directions, extra_, K_, k.directions, k.directions, inv_k_);
            sound_ = sound_ & pivots.positive;
            solve_both<P>(K_, k.directions, inv_k_, k.directions, f_);
        }
        measure();
        Vec low_s = P::splat(INF), low_z = P::splat(INF), high_s{}, high_z{};
        each_row([&](Index at, Index direction, double sign) {
            const Vec side = P::load(side_ + at), v = sign * P::load(u_ + direction);
            const Vec s = side - v, z = (v - side) / P::load(ratio_ + at);
            const Mask here = on(at);
            P::store(s_ + at, s);
            P::store(z_ + at, z);
            low_s = vmin(low_s, select(here, s, P::splat(INF)));
            low_z = vmin(low_z, select(here, z, P::splat(INF)));
            high_s = vmax(high_s, select(here, vabs(s), 0.0));
            high_z = vmax(high_z, select(here, vabs(z), 0.0));
        });
        const Number shift_s = interior_shift<Number>(P::min(low_s), P::max(high_s));
        const Number shift_z = interior_shift<Number>(P::min(low_z), P::max(high_z));
        each_row([&](Index at, Index, double) {
            const Mask here = on(at);
            const Vec s = select(here, P::load(s_ + at) + P::splat(shift_s), 1.0);
            P::store(s_ + at, s);
            P::store(z_ + at, select(here, far_multiplier(s, P::load(z_ + at) + P::splat(shift_z)), 0.0));
        });
    }

    // u = u0 - R f
    void measure() {
        std::memcpy(u_, u0_, bytes(k.directions));
        add_symmetric<P>(m_->R, k.directions, k.directions, f_, -1, u_);
    }

    // f = the sum of sign * z over the rows of each direction
    void collect_forces() {
        clear(f_, k.directions);
        each_row([&](Index at, Index direction, double sign) {
            P::store(f_ + direction, P::load(f_ + direction) + sign * P::load(z_ + at));
        });
    }

    // Mehrotra's predictor-corrector method, as diffopt.solvers.interior_point.solve; see there for the choices.
    // A polish costs more than a step, so problems that are due for one wait, as they are, until all in their group are.
    // Returns which of the problems in `running` were solved, in at most so many steps.
    Flag iterate(Flag running, int64_t limit, const Answer& answer) {
        Flag waiting{}, at_end{}, done{};
        Number last_mu = Number{} + INF, slow{}, stalled{}, tried = Number{} + INF, failures{}, steps{};
        const Number most_steps = Number{} + static_cast<double>(limit);
        for (;;) {
            PROFILE_THEN(PRODUCT, P::S * 2 * square(k.m + k.b));
            collect_forces();
            measure();
            PROFILE_THEN(STEP, 0);
            Vec mu_sum{}, violation{}, size{}, gap_sum{}, side_sum{};
            Mask changed{};
            each_row([&](Index at, Index direction, double sign) {
                const Mask here = on(at);
                const Vec s = P::load(s_ + at), z = P::load(z_ + at), side = P::load(side_ + at);
                const Vec v = select(here, sign * P::load(u_ + direction), 0.0);
                P::store(r_ + at, select(here, v + s - side, 0.0));
                mu_sum += select(here, s * z, 0.0);
                violation = vmax_nan(v - side, violation);
                size = vmax(vmax(vabs(v), crossed_side(v, side)), size);
                gap_sum += z * (side - v);
                side_sum += z * side;
                const Mask above = here & (z > s);
                changed |= above ^ P::load_mask(above_ + at);
                P::store_mask(above_ + at, above);
            });
            const Number mu = P::sum(mu_sum) / vmax(total_, Number{} + 1.0);
            const Number primal = P::max(violation) / (1.0 + P::max(size));
            const Number gap = vabs(P::sum(gap_sum)) / (1.0 + vmax(vabs(P::sum(side_sum)), objective_));
            const Number residual = vmax_nan(primal, gap);
            const Flag close = residual <= options_.tolerance;
            // The right active set is often known long before the point is accurate.
            const Flag repeated = none_of(P::any_entry(changed)) & (steps > 0.0);
            const Flag due = running & (close | ((residual <= TRY) & repeated & (residual <= 0.1 * tried)));
            tried = select(due, residual, tried);
            at_end = (at_end & none_of(due)) | (due & close);
            waiting = waiting | due;
            const Flag able = (residual < INF) & (stalled < 3.0) & (steps < most_steps);
            running = running & none_of(due) & able;
            if (!any(running)) {
                if (!any(waiting)) break;
                const Flag solved = polish(waiting, at_end, steps, answer), failed = waiting & none_of(solved);
                done = done | solved;
                failures = failures + select(failed & at_end, Number{} + 1.0, Number{});
                running = failed & able & (failures < 3.0);
                waiting = Flag{};
                if (!any(running)) break;
            }

            factor_step(running);
            direction(Number{}, false);
            const Number alpha_affine = longest_step();
            Vec affine_sum{};
            each_row([&](Index at, Index, double) {
                const Vec a = P::splat(alpha_affine);
                const Vec s = P::load(s_ + at) + a * P::load(ds_ + at), z = P::load(z_ + at) + a * P::load(dz_ + at);
                affine_sum += select(on(at), s * z, 0.0);
            });
            const Number mu_affine = P::sum(affine_sum) / vmax(total_, Number{} + 1.0);
            Number ratio = mu_affine / select(mu > 0.0, mu, Number{} + 1.0);
            ratio = vmin(vmax(ratio, Number{}), Number{} + 1.0);
            // Complementarity must not run ahead of feasibility.
            const Number sigma = select(mu < AHEAD * residual, Number{} + 1.0, ratio * ratio * ratio);
            direction(sigma * mu, true);
            const Number longest = longest_step();
            Number eta = vmin(vmax(1.0 - mu, Number{} + 0.995), Number{} + (1 - 1e-7));
            slow = slow + select(running & (mu > 0.7 * last_mu), Number{} + 1.0, Number{});
            // An iterate far from the centre is blocked again and again; short steps let the centring work.
            eta = select((slow >= 2.0) & (longest < 0.9), Number{} + 0.9, eta);
            Number alpha = vmin(eta * longest, Number{} + 1.0);
            alpha = select(running & (alpha >= 0.0), alpha, Number{});
            each_row([&](Index at, Index, double) {
                const Vec a = P::splat(alpha);
                P::store(s_ + at, P::load(s_ + at) + a * P::load(ds_ + at));
                P::store(z_ + at, P::load(z_ + at) + a * P::load(dz_ + at));
            });
            stalled = select(running, select(alpha < 1e-4, stalled + 1.0, Number{}), stalled);
            last_mu = select(running, mu, last_mu);
            steps = steps + select(running, Number{} + 1.0, Number{});
        }
        steps_before_ = steps_before_ + steps;
        return done;
    }

    void factor_step(Flag& running) {
        PROFILE_THEN(FORM, 0);
        for (Index q = 0; q < k.packs(k.directions); q++) P::store(inverse_w_ + q * P::W, Vec{});
        each_row([&](Index at, Index direction, double) {
            // (Divisions are slow: each of these serves several times.)
            const Vec s = P::load(s_ + at), z = P::load(z_ + at), inverse_s = 1.0 / s, inverse_z = 1.0 / z;
            const Vec weight = select(on(at), z * inverse_s, 0.0);
            P::store(inverse_s_ + at, inverse_s);
            P::store(inverse_z_ + at, inverse_z);
            P::store(ratio_ + at, s * inverse_z);
            P::store(weight_ + at, weight);
            P::store(inverse_w_ + direction, P::load(inverse_w_ + direction) + weight);
        });
        for (Index q = 0; q < k.packs(k.directions); q++) {
            const Vec w = P::load(inverse_w_ + q * P::W), inverse = select(w > 0.0, 1.0 / w, P::splat(OFF));
            P::store(inverse_w_ + q * P::W, inverse);
            P::store(extra_ + q * P::W, inverse + SHIFT);
        }
        PROFILE_THEN(FACTOR, P::S * cube(k.m + k.b) / 3);
        const auto pivots = cholesky<P>(m_->R, k.directions, extra_, K_, k.directions, k.directions, inv_k_);
        running = running & pivots.positive;
    }

    // The Newton direction for  s z = tau, tau = target - ds dz of the direction before (`second`), else target.
    void direction(Number target, bool second) {
        PROFILE_THEN(STEP, 0);
        const Index qd = k.packs(k.directions);
        clear(g_, k.directions);
        each_row([&](Index at, Index direction, double sign) {
            const Vec s = P::load(s_ + at);
            Vec tau = P::splat(target);
            if (second) tau -= P::load(ds_ + at) * P::load(dz_ + at);
            tau *= P::load(inverse_z_ + at);
            const Vec side = s - P::load(r_ + at) - tau;
            P::store(ds_ + at, tau);
            P::store(dz_ + at, side);
            P::store(g_ + direction, P::load(g_ + direction) + select(on(at), sign * side * P::load(weight_ + at), 0.0));
        });
        for (Index q = 0; q < qd; q++) {
            const Vec g = P::load(g_ + q * P::W) * P::load(inverse_w_ + q * P::W);
            P::store(g_ + q * P::W, g);
            P::store(df_ + q * P::W, -g);
        }
        PROFILE_THEN(SOLVES, P::S * 2 * square(k.m + k.b));
        solve_both<P>(K_, k.directions, inv_k_, k.directions, df_);
        PROFILE_THEN(STEP, 0);
        if (two_sided_) split_two_sided();
        each_row([&](Index at, Index direction, double sign) {
            const Mask here = on(at);
            const Vec s = P::load(s_ + at), z = P::load(z_ + at), e = P::load(ratio_ + at), tau = P::load(ds_ + at);
            const bool split = two_sided_ && direction >= k.mp * P::S;
            const Vec df = P::load(df_ + direction);
            const Vec dz = split ? P::load(dz_ + at) : sign * df;
            const Vec du = df * P::load(inverse_w_ + direction) + P::load(g_ + direction);
            // Where s is small its change is taken from complementarity, elsewhere from feasibility.
            const Vec ds = select(s < z, tau - s - e * dz, -P::load(r_ + at) - sign * du);
            P::store(ds_ + at, select(here, ds, 0.0));
            P::store(dz_ + at, select(here, dz, 0.0));
        });
    }

    // Of a variable's two bounds the one with the smaller weight is computed directly, the other takes the rest of
    // the force, which the system knows accurately. On entry dz_ holds the sides of the rows.
    void split_two_sided() {
        for (Index q = 0; q < k.packs(k.bp); q++) {
            const Index l = lower_ * P::S + q * P::W, u = upper_ * P::S + q * P::W, direction = k.mp * P::S + q * P::W;
            const Mask on_l = on(l), on_u = on(u);
            const Vec w_l = P::load(weight_ + l), w_u = P::load(weight_ + u), df = P::load(df_ + direction);
            const Vec du = df * P::load(inverse_w_ + direction) + P::load(g_ + direction);
            const Vec direct_l = select(on_l, (-du - P::load(dz_ + l)) * w_l, 0.0);
            const Vec direct_u = select(on_u, (du - P::load(dz_ + u)) * w_u, 0.0);
            const Mask light_l = on_u & (none_of(on_l) | (w_l <= w_u));
            P::store(dz_ + l, select(light_l, direct_l, direct_u - df));
            P::store(dz_ + u, select(light_l, df + direct_l, direct_u));
        }
    }

    Number longest_step() const {
        Vec blocked = P::splat(1.0);  // the inverse of the step
        each_row([&](Index at, Index, double) {
            const Mask here = on(at);
            const Vec s = -P::load(ds_ + at) * P::load(inverse_s_ + at), z = -P::load(dz_ + at) * P::load(inverse_z_ + at);
            blocked = vmax(select(here, vmax(s, z), 0.0), blocked);
        });
        return 1.0 / P::max(blocked);
    }

    // ---- from an earlier solution ----------------------------------------------------------------------------

    // Reads it into x_, y_ and z_ (zero where there is no row), in equilibrated units. Returns where it is finite.
    template <class T> Flag read_start() {
        clear(x_, k.np), clear(y_, k.joint), clear(z_, rows_);
        Number finite{};
        for (int lane = 0; lane < P::S; lane++) {
            const Index i = first_ + lane < batch_.count ? first_ + lane : batch_.count - 1;
            double sum = 0;  // stays zero only if nothing is infinite or NaN
            auto copy = [&](const void* from, Index size, double* target) {
                const T* source = static_cast<const T*>(from) + i * size;
                for (Index r = 0; r < size; r++) {
                    const double v = static_cast<double>(source[r]);
                    sum += v * 0.0;
                    if (target) target[r * P::S + lane] = v;
                }
            };
            const Start& from = batch_.start;
            copy(from.x, k.n, x_);
            copy(from.nu, k.p, y_);
            copy(from.lam, k.m, z_);
            copy(from.lower, k.n, batch_.has(FIELD_LOWER) ? z_ + lower_ * P::S : nullptr);
            copy(from.upper, k.n, batch_.has(FIELD_UPPER) ? z_ + upper_ * P::S : nullptr);
            P::set_lane(finite, lane, sum);
        }
        const Vec cost = P::splat(m_->cost);
        for (Index q = 0; q < k.packs(k.np); q++) P::store(x_ + q * P::W, P::load(x_ + q * P::W) / P::load(m_->d + q * P::W));
        for (Index q = 0; q < k.packs(k.pp); q++)
            P::store(y_ + q * P::W, P::load(y_ + q * P::W) * cost / P::load(m_->eq + q * P::W));
        each_row([&](Index at, Index direction, double) {
            const bool bound = direction >= k.mp * P::S;
            const Index entry = direction - (bound ? k.mp * P::S : 0);
            const Vec unit = bound ? P::load(m_->d + entry) : 1.0 / P::load(m_->rows + entry);
            P::store(z_ + at, select(on(at), vmax(P::load(z_ + at) * cost * unit, Vec{}), 0.0));
        });
        return finite == 0.0;
    }

    // Tries its active set, then the interior-point method from near it. Returns what is settled: solved, or left to the
    // general method, which knows what to do with active rows that depend on each other.
    Flag begin_near(const Answer& answer) {
        const Flag usable = sound_ & (batch_.single ? read_start<float>() : read_start<double>());
        if (!any(usable)) return Flag{};
        each_row([&](Index at, Index, double) { P::store_mask(above_ + at, P::load(z_ + at) > HELD_FROM); });
        const Flag solved = polish(usable, usable, Number{}, answer, WARM_FLIPS);
        const Flag left = dependent_;
        Flag open = usable & none_of(solved | left);
        if (!any(open)) return solved | left;
        // How far it is from a solution: of each row the smaller of multiplier and slack should be zero.
        if (batch_.single) read_start<float>();
        else read_start<double>();
        collect_forces();
        std::memcpy(y_ + k.pp * P::S, f_, bytes(k.directions));
        residual_of_point();
        Vec error{};
        for (Index q = 0; q < k.packs(k.np); q++) {
            const Index at = q * P::W;
            error = vmax_nan(vabs(P::load(Qx_ + at) + P::load(q_ + at) + P::load(pull_ + at) + P::load(push_ + at)), error);
        }
        for (Index q = 0; q < k.packs(k.pp); q++)
            error = vmax_nan(vabs(P::load(Cx_ + q * P::W) - P::load(b_ + q * P::W)), error);
        each_row([&](Index at, Index direction, double sign) {
            const Vec slack = P::load(side_ + at) - sign * P::load(Cx_ + k.pp * P::S + direction), z = P::load(z_ + at);
            P::store(s_ + at, slack);
            error = vmax_nan(select(on(at), vabs(vmin(slack, z)), 0.0), error);
        });
        const Number worst = vmax(P::max(error), Number{} + SMALLEST_ERROR);
        open = open & (worst <= LARGEST_ERROR);
        if (!any(open)) return solved | left;
        // Near it, where s z is at least so much in every row.
        const Vec product = P::splat(worst), root = vsqrt(product);
        each_row([&](Index at, Index, double) {
            const Mask here = on(at);
            const Vec slack = vmax(P::load(s_ + at), Vec{}), multiplier = P::load(z_ + at);
            const Vec larger_s = vmax(slack, root), larger_z = vmax(multiplier, root);
            const Mask held = multiplier > slack;
            P::store(s_ + at, select(here, select(held, vmax(slack, product / larger_z), larger_s), 1.0));
            P::store(z_ + at, select(here, select(held, larger_z, vmax(multiplier, product / larger_s)), 0.0));
        });
        return solved | left | iterate(open, std::min(WARM_STEPS, options_.max_iterations), answer);
    }

    Flag polish(Flag due, Flag at_end, Number steps, const Answer& answer, int rounds = FLIPS);
    Flag hold();
    void solve_held(double* right);
    void residual_of_point();
    void gather_held();
    void aim();
    Flag flip(Flag which);
    void refine(Flag which);
    Flag clip_multipliers();
    Number measure_point(Flag& inside);
    void finish(Flag accepted, Number steps, const Answer& answer);
    template <class T> void write_points(Flag accepted, const Answer& answer);
    void keep(const Answer& answer);
    void keep_lanes(Flag accepted, const Answer& answer);
    void keep_sides(int lane, const Answer& answer);

    // Columns of the held rows: of V where other entries of y are zero, else gathered.
    const double* held_matrix() const { return P::LANES ? m_->V : B_; }
    std::size_t bytes(Index entries) const { return static_cast<std::size_t>(entries * P::S) * sizeof(double); }
    void clear(double* v, Index entries) const { std::memset(v, 0, bytes(entries)); }
};

}  // namespace diffopt

#include "polish.hpp"
