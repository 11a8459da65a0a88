// The derivative of a solution, transposed: one solve with the factor that the forward pass left.
//
// With K the KKT matrix of the final active set and y = K^-1 (gradients of x, nu, lam, bound forces):
//   dq = -y_x,  db = y_eq,  dh = y_row,  dlower or dupper = y_bound,
//   dQ = (dq x' + x dq')/2,  dA = nu dq' - db x',  dG = lam dq' - dh x'.
// The slack of an inactive row, h - Gx, passes its gradient to dh and, through x, to y.
#pragma once
#include "saved.hpp"

namespace diffopt {

struct Gradients {
    const void *x, *s, *lam, *nu, *lower, *upper;           // incoming, of the data's type; null is zero
    void *dQ, *dq, *dA, *db, *dG, *dh, *dlower, *dupper;    // outgoing, one per instance; null where not wanted.
};                                                          // dq, db and dh are always wanted.

// Scratch of a thread.
struct PullbackWork {
    std::vector<double> x, y, inv;
    void fit(Index n) {
        const std::size_t size = static_cast<std::size_t>(padded<Single>(n) + W);
        if (x.size() != size) x.assign(size, 0.0), y.assign(size, 0.0), inv.assign(size, 0.0);
    }
};

// target (rows x n) = a_i u' - b_i v'
template <class T>
INLINE void outer_difference(T* target, Index rows, Index n, const T* a, const T* u, const T* b, const T* v) {
    for (Index i = 0; i < rows; i++)
        for (Index j = 0; j < n; j++) target[i * n + j] = a[i] * u[j] - b[i] * v[j];
}

template <class T>
void pull_back(const Batch& batch, const Answer& answer, const Gradients& g, Index i, PullbackWork& work) {
    const Index n = batch.n, p = batch.p, m = batch.m;
    auto in = [&](const void* v, Index size) { return v ? static_cast<const T*>(v) + i * size : nullptr; };
    auto out = [&](void* v, Index size) { return v ? static_cast<T*>(v) + i * size : nullptr; };
    T *dq = out(g.dq, n), *db = out(g.db, p), *dh = out(g.dh, m), *dlower = out(g.dlower, n), *dupper = out(g.dupper, n);
    T *dQ = out(g.dQ, n * n), *dA = out(g.dA, p * n), *dG = out(g.dG, m * n);
    auto zero = [](T* v, Index size) { if (v) std::memset(v, 0, static_cast<std::size_t>(size) * sizeof(T)); };
    zero(dh, m);
    zero(dlower, n);
    zero(dupper, n);
    if (answer.saved[i * answer.saved_stride] == NO_RECORD) {
        zero(dq, n);
        zero(db, p);
        zero(dQ, n * n);
        zero(dA, p * n);
        zero(dG, m * n);
        return;
    }
    Saved saved(batch, answer, i);
    saved.open();
    work.fit(n);
    double *rx = work.x.data(), *ry = work.y.data(), *inv = work.inv.data();
    std::memset(rx, 0, work.x.size() * sizeof(double));
    std::memset(ry, 0, work.y.size() * sizeof(double));
    const T *gx = in(g.x, n), *gs = in(g.s, m), *glam = in(g.lam, m), *gnu = in(g.nu, p), *glower = in(g.lower, n),
            *gupper = in(g.upper, n);

    for (Index j = 0; j < n; j++) rx[j] = gx ? static_cast<double>(gx[j]) : 0.0;
    if (gs) {
        // Active rows have no slack to move; dh serves as the list of which they are.
        for (Index j = 0; j < m; j++) dh[j] = gs[j];
        for (Index j = 0; j < saved.count; j++) {
            const Index place = static_cast<Index>(saved.held[j]) - p;
            if (saved.held[j] >= 0 && place >= 0 && place < m) dh[place] = 0;
        }
        const T *G = batch.at<T>(FIELD_G, i), *h = batch.at<T>(FIELD_h, i);
        for (Index r = 0; r < m; r++) {
            if (static_cast<double>(h[r]) == INF) dh[r] = 0;
            if (dh[r] != 0)
                for (Index j = 0; j < n; j++) rx[j] -= static_cast<double>(dh[r]) * static_cast<double>(G[r * n + j]);
        }
    }
    const double cost = saved.cost();
    for (Index j = 0; j < n; j++) rx[j] *= cost * saved.d[j];
    auto inverse_diagonal = [&](const double* U, Index ld, Index size) {
        for (Index j = 0; j < size; j++) inv[j] = 1 / U[j * ld + j];
        return inv;
    };
    solve_transposed<Single>(saved.U, saved.ldu, inverse_diagonal(saved.U, saved.ldu, n), n, rx);
    const Index packs = saved.ld / W;
    add_transposed<Single>(saved.V, saved.ld, n, rx, 1, ry, 0, packs);
    for (Index j = 0; j < saved.count; j++) {
        const double place = saved.held[j];
        const Index at = static_cast<Index>(place < 0 ? -1 - place : place);
        double right = 0;
        if (at < p) right = gnu ? saved.eq[at] * static_cast<double>(gnu[at]) : 0.0;
        else if (at < p + m) right = glam ? saved.rows[at - p] * static_cast<double>(glam[at - p]) : 0.0;
        else if (place < 0) right = glower ? -static_cast<double>(glower[at - p - m]) / saved.d[at - p - m] : 0.0;
        else right = gupper ? static_cast<double>(gupper[at - p - m]) / saved.d[at - p - m] : 0.0;
        ry[j] -= right;
    }
    solve_both<Single>(saved.M, saved.ld, inverse_diagonal(saved.M, saved.ld, saved.count), saved.count, ry);
    add_product<Single>(saved.V, saved.ld, n, ry, -1, rx, 0, packs);
    solve<Single>(saved.U, saved.ldu, inverse_diagonal(saved.U, saved.ldu, n), n, rx);

    for (Index j = 0; j < n; j++) dq[j] = static_cast<T>(-rx[j] * saved.d[j]);
    for (Index j = 0; j < p; j++) db[j] = 0;
    for (Index j = 0; j < saved.count; j++) {
        const double place = saved.held[j];
        const Index at = static_cast<Index>(place < 0 ? -1 - place : place);
        if (at < p) db[at] = static_cast<T>(ry[j] * saved.eq[at] / cost);
        else if (at < p + m) dh[at - p] = static_cast<T>(ry[j] * saved.rows[at - p] / cost);
        else {
            T* side = place < 0 ? dlower : dupper;
            if (side) side[at - p - m] = static_cast<T>(ry[j] / (cost * saved.d[at - p - m]));
        }
    }
    const T *x = static_cast<const T*>(answer.x) + i * n, *nu = static_cast<const T*>(answer.nu) + i * p,
            *lam = static_cast<const T*>(answer.lam) + i * m;
    if (dQ)
        for (Index r = 0; r < n; r++) {
            const T a = T(0.5) * dq[r], b = T(0.5) * x[r];
            for (Index c = 0; c < n; c++) dQ[r * n + c] = a * x[c] + b * dq[c];
        }
    if (dA) outer_difference(dA, p, n, nu, dq, db, x);
    if (dG) outer_difference(dG, m, n, lam, dq, dh, x);
}

}  // namespace diffopt
