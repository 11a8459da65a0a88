// The derivative of a solution, transposed: one solve with the factor that the forward pass left.
//
// With K the KKT matrix of the final active set and y = K^-1 (gradients of x, nu, lam, bound forces):
//   dq = -y_x,  db = y_eq,  dh = y_row,  dlower or dupper = y_bound,
//   dQ = (dq x' + x dq')/2,  dA = nu dq' - db x',  dG = lam dq' - dh x'.
// The slack of an inactive row, h - Gx, passes its gradient to dh and, through x, to y.
#pragma once
#include "saddle.hpp"
#include "saved.hpp"

namespace diffopt {

struct Gradients {
    const void *x, *s, *lam, *nu, *lower, *upper;           // incoming, of the data's type; null is zero
    void *dQ, *dq, *dA, *db, *dG, *dh, *dlower, *dupper;    // outgoing, one per instance; null where not wanted.
    void* dfactor;                                          // dq, db and dh are always wanted.
};

// The system of an active set, assembled anew.
struct Reassembled {
    Scaled problem;
    Saddle saddle;
    Arena arena;
    double *right = nullptr, *u = nullptr;
    explicit Reassembled(const Sizes& sizes) : problem(sizes), saddle(problem) {
        arena.lay_out([&](Arena& a) {
            problem.plan(a);
            saddle.plan(a);
            right = a.take(saddle.size);
            u = a.take(saddle.size);
        });
    }
};

constexpr double POOR = 1e-6;  // relative residual up to which a derivative's system is solved (diffopt.errors.ADJOINT)

constexpr Index LINE = 8;  // doubles in a line of the caches

// Scratch of a thread.
struct PullbackWork {
    std::vector<double> x, y, inv, lanes, stage, inverse;
    std::unique_ptr<Reassembled> general;
    int64_t poor = 0;  // instances whose system could not be solved, and whose gradient is not to be relied on
    Reassembled& get(const Sizes& sizes) {
        if (!general || !(general->problem.k == sizes)) general.reset(), general = std::make_unique<Reassembled>(sizes);
        return *general;
    }
    void fit(Index n) {
        const std::size_t size = static_cast<std::size_t>(padded<Single>(n) + W);
        if (x.size() == size) return;
        for (std::vector<double>* v : {&x, &y, &inv}) v->assign(size, 0.0);
        stage.assign(static_cast<std::size_t>(n + LINE), 0.0);
    }
};

// Bytes of gradients of matrices above which they are written around the caches.
constexpr double TOO_LARGE_FOR_CACHES = 4e6;

// target (rows x n) = a_i u' - b_i v'. `stage`, if not null: room for n + LINE numbers, by which it is written around the
// caches: whole lines of memory at a time, or it would take several times as long.
template <class T>
INLINE void outer_difference(T* target, Index rows, Index n, const T* a, const T* u, const T* b, const T* v, double* stage) {
    auto write_row = [&](T* row, Index i) {
        for (Index j = 0; j < n; j++) row[j] = a[i] * u[j] - b[i] * v[j];
    };
    if constexpr (std::is_same_v<T, double>) {
        if (stage) {
            Index ahead = (LINE - static_cast<Index>(reinterpret_cast<std::size_t>(target) / sizeof(double)) % LINE) % LINE;
            Index filled = 0;
            for (Index i = 0; i < rows; i++) {
                write_row(stage + filled, i);
                filled += n;
                Index done = std::min(ahead, filled);
                std::copy_n(stage, done, target);
                ahead -= done;
                for (; done + LINE <= filled; done += LINE)
                    for (Index j = 0; j < LINE; j += W) stream(target + done + j, Wide::load(stage + done + j));
                target += done;
                filled -= done;
                std::copy_n(stage + done, filled, stage);
            }
            std::copy_n(stage, filled, target);
            return;
        }
    }
    for (Index i = 0; i < rows; i++) write_row(target + i * n, i);
}

// The pullback of one instance: what comes in, and where what goes out is written.
template <class T> struct Pull {
    const Batch& batch;
    const Answer& answer;
    Index i, n, p, m;
    const T *gx, *gs, *glam, *gnu, *glower, *gupper;
    T *dQ, *dq, *dA, *db, *dG, *dh, *dlower, *dupper, *dfactor;
    bool forward = false;

    Pull(const Batch& batch, const Answer& answer, const Gradients& g, Index i) : Pull(batch, answer, g, i, i) {}
    // With the gradients of instance i at another place than the i-th.
    Pull(const Batch& batch, const Answer& answer, const Gradients& g, Index i, Index at)
        : batch(batch), answer(answer), i(i), n(batch.n), p(batch.p), m(batch.m) {
        auto in = [&](const void* v, Index size) { return v ? static_cast<const T*>(v) + at * size : nullptr; };
        auto out = [&](void* v, Index size) { return v ? static_cast<T*>(v) + at * size : nullptr; };
        gx = in(g.x, n), gs = in(g.s, m), glam = in(g.lam, m);
        gnu = in(g.nu, p), glower = in(g.lower, n), gupper = in(g.upper, n);
        dQ = out(g.dQ, hessian_size()), dq = out(g.dq, n), dA = out(g.dA, p * n), db = out(g.db, p);
        dG = out(g.dG, m * n), dh = out(g.dh, m), dlower = out(g.dlower, n), dupper = out(g.dupper, n);
        dfactor = out(g.dfactor, n * batch.rank);
    }
    Index hessian_size() const { return batch.hessian == DENSE ? n * n : n; }

    void fill_all(T value) const {
        auto fill = [&](T* v, Index size) { if (v) std::fill_n(v, size, value); };
        fill(dq, n), fill(db, p), fill(dh, m), fill(dlower, n), fill(dupper, n);
        fill(dQ, hessian_size()), fill(dA, p * n), fill(dG, m * n), fill(dfactor, n * batch.rank);
    }
    bool asked() const {
        auto any_entry = [](const T* v, Index size) {
            bool found = false;
            for (Index j = 0; v && j < size; j++) found = found || v[j] != 0;  // NaN too
            return found;
        };
        return any_entry(gx, n) || any_entry(gs, m) || any_entry(glam, m) || any_entry(gnu, p) ||
               any_entry(glower, n) || any_entry(gupper, n);
    }
    void clear_vectors() const {
        auto zero = [](T* v, Index size) { if (v) std::fill_n(v, size, T(0)); };
        zero(db, p), zero(dh, m), zero(dlower, n), zero(dupper, n);
    }
    // What variable j brings to the right-hand side. (Forward it is the tangent of the gradient, which is to stay zero.)
    double x_in(Index j) const {
        const double value = gx ? static_cast<double>(gx[j]) : 0.0;
        return forward ? -value : value;
    }
    // The slack of rows that are not active, h - Gx, passes its gradient to dh and, through x, to `rx`. On entry dh
    // holds 1 in the active rows.
    void pass_slack(double* rx) const {
        for (Index r = 0; r < m; r++) dh[r] = gs && dh[r] == 0 ? gs[r] : T(0);
        if (!gs || !m) return;
        const T *G = batch.at<T>(FIELD_G, i), *h = batch.at<T>(FIELD_h, i);
        for (Index r = 0; r < m; r++) {
            if (static_cast<double>(h[r]) == INF) dh[r] = 0;
            if (dh[r] != 0)
                for (Index j = 0; j < n; j++) rx[j] -= static_cast<double>(dh[r]) * static_cast<double>(G[r * n + j]);
        }
    }

    // What variable j brings to the right-hand side of the row that holds it, by where it stands; and what the force
    // there is passed on as. A fixed variable stands at the mean of its bounds. Forward, gradients of multipliers are
    // tangents of bounds, and the other way round.
    double bound_in(Index j, double stands) const {
        auto value = [j](const T* v) { return v ? static_cast<double>(v[j]) : 0.0; };
        if (stands == FREE) return 0;
        const bool low = stands == AT_LOWER || stands == FIXED_DOWN;
        if (!forward) return low ? -value(glower) : value(gupper);
        return stands >= FIXED_DOWN ? 0.5 * (value(glower) + value(gupper)) : low ? value(glower) : value(gupper);
    }
    void bound_out(Index j, double stands, double force) const {
        const bool fixed = stands >= FIXED_DOWN, low = stands == AT_LOWER || stands == FIXED_DOWN;
        double to_lower = 0, to_upper = 0;
        if (forward) (low ? to_lower : to_upper) = low ? -force : force;
        else {
            if (low || fixed) to_lower = fixed ? 0.5 * force : force;
            if (!low || fixed) to_upper = fixed ? 0.5 * force : force;
        }
        if (dlower) dlower[j] = static_cast<T>(stands == FREE ? 0.0 : to_lower);
        if (dupper) dupper[j] = static_cast<T>(stands == FREE ? 0.0 : to_upper);
    }

    // The gradients of matrices, from those of vectors.
    void write_matrices(PullbackWork& work) const {
        const T *x = static_cast<const T*>(answer.x) + i * n, *nu = static_cast<const T*>(answer.nu) + i * p,
                *lam = static_cast<const T*>(answer.lam) + i * m;
        const double numbers = static_cast<double>(batch.count) * static_cast<double>(n) * static_cast<double>(n + p + m);
        work.fit(n);
        double* stage = numbers * sizeof(T) > TOO_LARGE_FOR_CACHES ? work.stage.data() : nullptr;
        PROFILE(PULL_DQ, 0, sizeof(T) * (dQ ? product(n, n) : 0));
        if (dQ && batch.hessian == DENSE) {
            T *half_q = reinterpret_cast<T*>(work.x.data()), *half_x = reinterpret_cast<T*>(work.y.data());
            for (Index j = 0; j < n; j++) half_q[j] = T(0.5) * dq[j], half_x[j] = T(-0.5) * x[j];
            outer_difference(dQ, n, n, half_q, x, half_x, dq, stage);
        }
        if (dQ && batch.hessian != DENSE)
            for (Index j = 0; j < n; j++) dQ[j] = dq[j] * x[j];
        if (dfactor) {
            // Q = diag + FF':  dF = dq (F'x)' + x (F'dq)'
            const T* F = batch.at<T>(FIELD_FACTOR, i);
            const Index k = batch.rank;
            for (Index c = 0; c < k; c++) {
                double by_x = 0, by_q = 0;
                for (Index j = 0; j < n; j++) {
                    by_x += static_cast<double>(F[j * k + c]) * static_cast<double>(x[j]);
                    by_q += static_cast<double>(F[j * k + c]) * static_cast<double>(dq[j]);
                }
                for (Index j = 0; j < n; j++)
                    dfactor[j * k + c] = static_cast<T>(static_cast<double>(dq[j]) * by_x + static_cast<double>(x[j]) * by_q);
            }
        }
        PROFILE_THEN(PULL_DA, 0, sizeof(T) * (dA ? product(p, n) : 0));
        if (dA) outer_difference(dA, p, n, nu, dq, db, x, stage);
        PROFILE_THEN(PULL_DG, 0, sizeof(T) * (dG ? product(m, n) : 0));
        if (dG) outer_difference(dG, m, n, lam, dq, dh, x, stage);
        if (stage) stream_end();
    }
};

// The solve with a factor that was kept whole.
template <class T> void pull_by_factor(const Pull<T>& g, PullbackWork& work) {
    const Index n = g.n, p = g.p, m = g.m;
    Saved saved(g.batch, g.answer, g.i);
    saved.open();
    PROFILE(ADJOINT, 2 * square(n) + 4 * product(n, saved.count) + 2 * square(saved.count), 8.0 * (saved.end() - saved.head));
    saved.fetch();
    PROFILE_THEN(PULL_IN, 0);
    work.fit(n);
    double *rx = work.x.data(), *ry = work.y.data(), *inv = work.inv.data();
    std::memset(rx, 0, work.x.size() * sizeof(double));
    std::memset(ry, 0, work.y.size() * sizeof(double));
    for (Index j = 0; j < n; j++) rx[j] = g.gx ? static_cast<double>(g.gx[j]) : 0.0;
    if (g.gs)
        for (Index j = 0; j < saved.count; j++) {
            const Index place = static_cast<Index>(saved.held[j]) - p;
            if (saved.held[j] >= 0 && place >= 0 && place < m) g.dh[place] = 1;
        }
    g.pass_slack(rx);
    const double cost = saved.cost();
    for (Index j = 0; j < n; j++) rx[j] *= cost * saved.d[j];
    auto inverse_diagonal = [&](const PackedRows& U, Index size) {
        for (Index j = 0; j < size; j++) inv[j] = 1 / U(j)[j];
        return inv;
    };
    PROFILE_THEN(ADJOINT, 0);
    solve_transposed<Single>(saved.U, inverse_diagonal(saved.U, n), n, rx);
    const Index packs = saved.ld / W;
    add_transposed<Single>(saved.V, saved.ld, n, rx, 1, ry, 0, packs);
    for (Index j = 0; j < saved.count; j++) {
        const double place = saved.held[j];
        const Index at = static_cast<Index>(place < 0 ? -1 - place : place);
        double right = 0;
        if (at < p) right = g.gnu ? saved.eq[at] * static_cast<double>(g.gnu[at]) : 0.0;
        else if (at < p + m) right = g.glam ? saved.rows[at - p] * static_cast<double>(g.glam[at - p]) : 0.0;
        else if (place < 0) right = g.glower ? -static_cast<double>(g.glower[at - p - m]) / saved.d[at - p - m] : 0.0;
        else right = g.gupper ? static_cast<double>(g.gupper[at - p - m]) / saved.d[at - p - m] : 0.0;
        ry[j] -= right;
    }
    inverse_diagonal(saved.M, saved.count);
    solve_transposed<Single>(saved.M, inv, saved.count, ry);
    solve<Single>(saved.M, inv, saved.count, ry);
    add_product<Single>(saved.V, saved.ld, n, ry, -1, rx, 0, packs);
    solve<Single>(saved.U, inverse_diagonal(saved.U, n), n, rx);

    PROFILE_THEN(PULL_OUT, 0);
    for (Index j = 0; j < n; j++) g.dq[j] = static_cast<T>(-rx[j] * saved.d[j]);
    for (Index j = 0; j < p; j++) g.db[j] = 0;
    for (Index j = 0; j < saved.count; j++) {
        const double place = saved.held[j];
        const Index at = static_cast<Index>(place < 0 ? -1 - place : place);
        if (at < p) g.db[at] = static_cast<T>(ry[j] * saved.eq[at] / cost);
        else if (at < p + m) g.dh[at - p] = static_cast<T>(ry[j] * saved.rows[at - p] / cost);
        else {
            T* side = place < 0 ? g.dlower : g.dupper;
            if (side) side[at - p - m] = static_cast<T>(ry[j] / (cost * saved.d[at - p - m]));
        }
    }
}

// The system of the active set, assembled and factored anew.
template <class T> Reassembled& reassembled(const Batch& batch, Index i, const Sides& sides, PullbackWork& work) {
    const Index n = batch.n, p = batch.p, m = batch.m;
    Reassembled& again = work.get(Sizes(batch));
    Scaled& k = again.problem;
    Saddle& saddle = again.saddle;
    k.read<T>(batch, i);
    for (Index j = 0; j < n; j++) k.dx[j] = sides.d[j];
    for (Index r = 0; r < p; r++) k.eq[r] = sides.eq[r];
    for (Index r = 0; r < m; r++) k.row[r] = sides.rows[r];
    k.cost = sides.cost();
    k.rescale();
    saddle.set_shift(sides.diagonal());
    for (Index r = 0; r < m; r++) saddle.row_in[r] = sides.row[r], saddle.row_e[r] = 0;
    for (Index j = 0; k.k.bounded() && j < n; j++) saddle.bound_in[j] = sides.bound[j] != FREE, saddle.bound_e[j] = 0;
    saddle.factor_active(sides.diagonal() ? DIAGONAL_FIRST : HELD);
    return again;
}

// The solve with it; returns whether it can be relied on.
template <class T> bool pull_by_sides(const Pull<T>& g, const Sides& sides, Reassembled& again) {
    const Index n = g.n, p = g.p, m = g.m;
    Scaled& k = again.problem;
    Saddle& saddle = again.saddle;
    double *right = again.right, *u = again.u;
    std::fill_n(right, saddle.size, 0.0);
    for (Index j = 0; j < n; j++) right[j] = g.x_in(j);
    // (Active rows have no slack to move, unless they depend on each other: then not all of them can be held.)
    const bool dependent = saddle.dependent() > 0;
    for (Index r = 0; r < m; r++) g.dh[r] = static_cast<T>(dependent ? 0.0 : sides.row[r]);
    g.pass_slack(right);
    const double cost = sides.cost();
    for (Index j = 0; j < n; j++) right[j] *= cost * k.dx[j];
    for (Index r = 0; r < p; r++) right[saddle.at_eq + r] = g.gnu ? k.eq[r] * static_cast<double>(g.gnu[r]) : 0.0;
    for (Index r = 0; r < m; r++)
        right[saddle.at_row + r] = g.glam && sides.row[r] != 0 ? k.row[r] * static_cast<double>(g.glam[r]) : 0.0;
    for (Index j = 0; k.k.bounded() && j < n; j++) right[saddle.at_bound + j] = g.bound_in(j, sides.bound[j]) / k.dx[j];
    const bool solved = saddle.solve_minimum_norm(right, u) <= POOR;
    const double sign = g.forward ? 1 : -1;
    for (Index j = 0; j < n; j++) g.dq[j] = static_cast<T>(sign * u[j] * k.dx[j]);
    for (Index r = 0; r < p; r++) g.db[r] = static_cast<T>(u[saddle.at_eq + r] * k.eq[r] / cost);
    for (Index r = 0; r < m; r++)
        if (sides.row[r] != 0) g.dh[r] += static_cast<T>(u[saddle.at_row + r] * k.row[r] / cost);
    for (Index j = 0; k.k.bounded() && j < n; j++) g.bound_out(j, sides.bound[j], u[saddle.at_bound + j] / (cost * k.dx[j]));
    return solved;
}

// What needs no solve: an instance without a record, or without a solution. Returns whether this is one.
template <class T> bool pull_nothing(const Pull<T>& g, double kind) {
    if (kind == NO_RECORD) g.fill_all(T(0));
    // What failed passes NaN to whoever asks for its derivative.
    if (kind == NO_SOLUTION) g.fill_all(g.asked() ? std::numeric_limits<T>::quiet_NaN() : T(0));
    return kind == NO_RECORD || kind == NO_SOLUTION;
}

// One problem. `next`: the one that comes after it in the same thread, if any, whose record is in one piece too.
template <class T>
void pull_back(const Batch& batch, const Answer& answer, const Places& places, const Gradients& gradients, Index i,
               Index next, PullbackWork& work) {
    const Pull<T> g(batch, answer, gradients, i);
    const double kind = *places.at(answer, i);
    if (pull_nothing(g, kind)) return;
    g.clear_vectors();
    if (kind == ONLY_SIDES) {
        const Sides sides(batch, places.at(answer, i), places.step(i));
        work.poor += !pull_by_sides(g, sides, reassembled<T>(batch, i, sides, work));
    } else pull_by_factor(g, work);
    // While matrices are written, the next record comes.
    if (next > i) {
        PROFILE(ADJOINT, 0);
        Saved saved(batch, answer, next);
        if (*saved.head >= 0) saved.open(), saved.fetch();
    }
    g.write_matrices(work);
}

// Small problems [first, last), that were kept side by side.
template <class P, class T>
void pull_lanes(const Batch& batch, const Answer& answer, const Places& places, const Gradients& gradients, Index first,
                Index last, PullbackWork& work) {
    PROFILE(PULL_IN, 0);
    using Vec = typename P::Vec;
    const Small<P> record(batch, answer, first);
    const Index n = record.n, p = record.p, m = record.m, joint = record.joint, S = P::S;
    const std::size_t size = static_cast<std::size_t>((n + joint) * S);
    if (work.lanes.size() != size) work.lanes.assign(size, 0.0);
    double *rx = work.lanes.data(), *ry = rx + n * S;
    std::fill_n(rx, size, 0.0);
    bool any_here = false;
    for (Index i = first; i < last; i++) {
        if (record.kind[i - first] != IN_LANES) continue;
        any_here = true;
        const Pull<T> g(batch, answer, gradients, i);
        g.clear_vectors();
        double *x = rx + (i - first), *y = ry + (i - first);
        const double* held = record.held + (i - first);
        if (g.gs) {
            work.fit(n);
            for (Index r = 0; r < m; r++) g.dh[r] = static_cast<T>(held[(p + r) * S]);
            std::fill_n(work.x.data(), n, 0.0);
            g.pass_slack(work.x.data());
            for (Index j = 0; j < n; j++) x[j * S] = work.x[static_cast<std::size_t>(j)];
        }
        if (g.gx)
            for (Index j = 0; j < n; j++) x[j * S] += static_cast<double>(g.gx[j]);
        if (g.gnu)
            for (Index r = 0; r < p; r++) y[r * S] = static_cast<double>(g.gnu[r]);
        if (g.glam)
            for (Index r = 0; r < m; r++) y[(p + r) * S] = static_cast<double>(g.glam[r]);
        for (Index j = 0; (g.glower || g.gupper) && p + m + j < joint; j++) {
            const double side = held[(p + m + j) * S];
            const T* from = side < 0 ? g.glower : g.gupper;
            y[(p + m + j) * S] = from && side != 0 ? side * static_cast<double>(from[j]) : 0.0;
        }
    }
    PROFILE_THEN(ADJOINT, P::S * (2 * square(n) + 4 * product(n, joint) + 2 * square(joint)), 8.0 * P::S * record.size(batch));
    if (any_here) {
        const Vec cost = P::load(record.cost);
        for (Index j = 0; j < n; j++) P::store(rx + j * S, P::load(rx + j * S) * cost * P::load(record.d + j * S));
        solve_transposed<P>(record.U, n, record.inv, n, rx);
        // ry = V'rx minus the right-hand side, over the held rows
        for (Index r = 0; r < joint; r++) {
            const Vec y = P::load(ry + r * S);
            const Vec unit = r < p ? P::load(record.eq + r * S) : r < p + m ? P::load(record.rows + (r - p) * S)
                                                                : 1.0 / P::load(record.d + (r - p - m) * S);
            P::store(ry + r * S, -y * unit);
        }
        add_transposed<P>(record.V, joint, n, rx, 1, ry, 0, joint);
        for (Index r = 0; r < joint; r++)
            P::store(ry + r * S, select(P::load(record.held + r * S) != 0.0, P::load(ry + r * S), P::splat(0.0)));
        solve_both<P>(record.M, joint, record.inv_m, joint, ry);
        add_product<P>(record.V, joint, n, ry, -1, rx, 0, joint);
        solve<P>(record.U, n, record.inv, n, rx);
        for (Index j = 0; j < n; j++) P::store(rx + j * S, -P::load(rx + j * S) * P::load(record.d + j * S));
        for (Index r = 0; r < joint; r++) {
            const Vec unit = r < p ? P::load(record.eq + r * S) : r < p + m ? P::load(record.rows + (r - p) * S)
                                                                : 1.0 / P::load(record.d + (r - p - m) * S);
            P::store(ry + r * S, P::load(ry + r * S) * unit / cost);
        }
    }
    PROFILE_THEN(PULL_OUT, 0);
    for (Index i = first; i < last; i++) {
        const Index lane = i - first;
        const Pull<T> g(batch, answer, gradients, i);
        const double kind = record.kind[lane];
        if (pull_nothing(g, kind)) continue;
        if (kind == ONLY_SIDES) {
            pull_back<T>(batch, answer, places, gradients, i, i, work);
            continue;
        }
        const double *x = rx + lane, *y = ry + lane, *held = record.held + lane;
        for (Index j = 0; j < n; j++) g.dq[j] = static_cast<T>(x[j * S]);
        for (Index r = 0; r < p; r++) g.db[r] = static_cast<T>(y[r * S]);
        for (Index r = 0; r < m; r++)
            if (held[(p + r) * S] != 0) g.dh[r] = static_cast<T>(y[(p + r) * S]);
        for (Index r = p + m; (g.dlower || g.dupper) && r < joint; r++) {
            T* side = held[r * S] < 0 ? g.dlower : g.dupper;
            if (side && held[r * S] != 0) side[r - p - m] = static_cast<T>(y[r * S]);
        }
        g.write_matrices(work);
    }
}

}  // namespace diffopt
