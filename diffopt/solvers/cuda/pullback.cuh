// The backward pass of one problem: from gradients of its solution to gradients of its data, by one KKT solve.
//
// At the solution F(x, nu, lam, forces; data) = 0 on the active set, so with y = K^-1 g the gradient of the data is
// -y'(dF/d data). The slack of an inactive row adds its own h - G x.
#pragma once
#include "kkt.cuh"

namespace diffopt {

struct BackwardMemory {
    Packed L, E, K;
    KktVectors kkt;
    Scaling scale;
    double *x, *nu, *force;                 // y, equilibrated; the force of every direction
    double *right, *g_slack;                // gradients of x and of inactive slacks, original units
    int *active, *list;                     // per direction: 0, 1 or -1 as in `Memory`; and its list

    __host__ __device__ static int size(const Sizes& z, int threads, bool large) {
        return (large ? 0 : triangle(z.n) + z.eliminated() + triangle(z.c)) + KktVectors::size(z) + 3 * z.n + 2 * z.p +
               2 * z.m + 2 * z.c + threads + 1;
    }

    // The factors of a large problem are used where they are kept.
    template <class Team>
    __device__ BackwardMemory(const Sizes& z, double* at, const Kept& kept, Team& team) {
        auto take = [&at](int count) {
            double* start = at;
            at += count;
            return start;
        };
        if constexpr (Team::LARGE) {
            L = {kept.L, z.n};
            E = {kept.E, z.all};
            K = {kept.K, z.c};
        } else {
            L = {take(triangle(z.n)), z.n};
            E = {take(z.eliminated()), z.all};
            K = {take(triangle(z.c)), z.c};
        }
        kkt.place(z, take);
        scale.d = take(z.n), x = take(z.n), right = take(z.n);
        nu = take(z.p), scale.rows = take(z.p + z.m), g_slack = take(z.m);
        force = take(z.c);
        int* ints = reinterpret_cast<int*>(take(z.c));
        active = ints, list = ints + z.c;
        team.scratch = take(team.size);
        team.flag = reinterpret_cast<int*>(take(1));
    }
};

// The gradient of the multiplier of active direction k as the solution's force sees it, in original units.
template <class T>
__device__ inline double force_gradient(const Sizes& z, const Backward<T>& task, long long i, int k, int active) {
    if (k < z.m) return task.g_lam ? double(task.g_lam[i * z.m + k]) : 0.0;
    const T* g = active > 0 ? task.g_upper : task.g_lower;
    return g ? active * double(g[i * z.n + k - z.m]) : 0.0;
}

// Write `count` numbers of instance i, if they are wanted.
template <class T, class Team, class F>
__device__ inline void write(const Team& team, T* to, long long i, int count, F value) {
    if (to == nullptr) return;
    for (int k = team.rank; k < count; k += team.size) to[i * count + k] = T(value(k));
}

template <class T, class Team>
__device__ inline void write_gradients(
    const Team& team, const Sizes& z, const Backward<T>& task, const BackwardMemory& at, const Kept& kept, long long i) {
    const int n = z.n, p = z.p, m = z.m;
    const KktVectors& v = at.kkt;
    const double *x = kept.x, *nu = kept.nu, *lam = kept.lam, *y = v.x_o;
    auto dh = [&](int k) { return at.active[k] ? v.lam_o[k] : at.g_slack[k]; };
    auto bound = [&](int j, int side) {
        return at.active[m + j] == side ? at.force[m + j] / (at.scale.cost * at.scale.d[j]) : 0.0;
    };
    write(team, task.dQ, i, n * n, [&](int k) { return -0.5 * (y[k / n] * x[k % n] + x[k / n] * y[k % n]); });
    write(team, task.dA, i, p * n, [&](int k) { return -(nu[k / n] * y[k % n] + v.eq_o[k / n] * x[k % n]); });
    write(team, task.dG, i, m * n, [&](int k) { return -(lam[k / n] * y[k % n] + dh(k / n) * x[k % n]); });
    write(team, task.dq, i, n, [&](int j) { return -y[j]; });
    write(team, task.db, i, p, [&](int e) { return v.eq_o[e]; });
    write(team, task.dh, i, m, dh);
    write(team, task.dlower, i, n, [&](int j) { return bound(j, -1); });
    write(team, task.dupper, i, n, [&](int j) { return bound(j, 1); });
    write(team, task.vectors, i, 2 * (n + p + m), [&](int k) {
        if (k < n) return y[k];
        if ((k -= n) < p) return v.eq_o[k];
        if ((k -= p) < m) return dh(k);
        if ((k -= m) < m) return lam[k];
        if ((k -= m) < n) return x[k];
        return nu[k - n];
    });
}

// Whether anything asks for the derivative of instance i.
template <class T, class Team>
__device__ inline bool asked(const Team& team, const Sizes& z, const Backward<T>& task, long long i) {
    bool mine = false;
    auto look = [&](const T* g, int count) {
        if (g == nullptr) return;
        for (int k = team.rank; k < count; k += team.size) mine |= g[i * count + k] != 0;
    };
    look(task.g_x, z.n), look(task.g_s, z.m), look(task.g_lam, z.m), look(task.g_nu, z.p);
    look(task.g_lower, z.n), look(task.g_upper, z.n);
    return team.any(mine);
}

// Differentiate instance i.
template <class T, class Team>
__device__ inline void pull_back(Team& team, const Backward<T>& task, long long i, long long, double* shared) {
    const Sizes z(int(task.n), int(task.p), int(task.m), task.bounded != 0, false);
    const int n = z.n, p = z.p, m = z.m, c = z.c;
    const Kept kept(z, const_cast<double*>(task.kept), const_cast<int*>(task.lists), i);
    const int active = kept.list[0];
    BackwardMemory at(z, shared, kept, team);
    if (active < 0) {
        // A failed instance has no gradient, and must not seem to have one.
        const double none = !task.others && asked(team, z, task, i) ? nan("") : 0.0;
        auto all = [none](int) { return none; };
        write(team, task.dQ, i, n * n, all), write(team, task.dA, i, p * n, all), write(team, task.dG, i, m * n, all);
        write(team, task.dq, i, n, all), write(team, task.db, i, p, all), write(team, task.dh, i, m, all);
        write(team, task.dlower, i, n, all), write(team, task.dupper, i, n, all);
        write(team, task.vectors, i, 2 * (n + p + m), all);
        return;
    }
    const Instance<T> data(task, i);
    const KktVectors& v = at.kkt;
    at.scale.cost = kept.cost[0];
    ActiveFactor F = {at.L, at.E, {at.K.at, active}, kept.V, at.list, active};
    if constexpr (!Team::LARGE) {
        for (int k = team.rank; k < triangle(n); k += team.size) at.L.at[k] = kept.L[k];
        for (int k = team.rank; k < z.eliminated(); k += team.size) at.E.at[k] = kept.E[k];
        for (int k = team.rank; k < triangle(active); k += team.size) at.K.at[k] = kept.K[k];
    }
    for (int k = team.rank; k < p + m; k += team.size) at.scale.rows[k] = kept.rows[k];
    for (int k = team.rank; k < c; k += team.size) at.active[k] = 0, at.force[k] = 0;
    for (int j = team.rank; j < n; j += team.size) at.scale.d[j] = kept.d[j], at.x[j] = 0;
    for (int e = team.rank; e < p; e += team.size) at.nu[e] = 0;
    team.sync();
    for (int k = team.rank; k < active; k += team.size) {
        at.list[k] = kept.list[1 + k];
        at.active[at.list[k] / 2] = at.list[k] % 2 ? -1 : 1;
    }
    team.sync();
    for (int k = team.rank; k < m; k += team.size) {
        const bool counts = task.g_s != nullptr && !at.active[k] && present(double(data.h[k]));
        at.g_slack[k] = counts ? double(task.g_s[i * m + k]) : 0.0;
    }
    team.sync();
    times_transposed(team, data.G, m, n, n, at.g_slack, v.push);
    for (int j = team.rank; j < n; j += team.size) {
        at.right[j] = (task.g_x ? double(task.g_x[i * n + j]) : 0.0) - v.push[j];
    }

    // The products of the zero vector, then one refinement on the unreduced system.
    for (int j = team.rank; j < n; j += team.size) v.Qx[j] = v.pull[j] = v.push[j] = v.x_o[j] = 0;
    for (int e = team.rank; e < p; e += team.size) v.Ax[e] = 0;
    for (int k = team.rank; k < m; k += team.size) v.Gx[k] = 0;
    for (int round = 0; round < 2; ++round) {
        team.sync();
        const Scaling& scale = at.scale;
        for (int j = team.rank; j < n; j += team.size) {
            v.r_x[j] = scale.cost * scale.d[j] * (at.right[j] - v.Qx[j] - v.pull[j] - v.push[j]);
        }
        for (int e = team.rank; e < p; e += team.size) {
            v.r_eq[e] = scale.rows[e] * ((task.g_nu ? double(task.g_nu[i * p + e]) : 0.0) - v.Ax[e]);
        }
        for (int k = team.rank; k < active; k += team.size) {
            const int row = F.direction(k);
            const double g = force_gradient(z, task, i, row, at.active[row]);
            v.r_a[k] = row < m ? scale.rows[p + row] * (g - v.Gx[row]) : (g - v.x_o[row - m]) / scale.d[row - m];
        }
        solve_kkt(team, z, F, v);
        for (int j = team.rank; j < n; j += team.size) at.x[j] += v.x[j];
        for (int e = team.rank; e < p; e += team.size) at.nu[e] += v.eq[e];
        for (int k = team.rank; k < active; k += team.size) at.force[F.direction(k)] += v.force[k];
        team.sync();
        if (round == 0) {
            products(team, z, data, scale, at.x, at.nu, at.force, v);
        } else {
            // Back in original units, without the products.
            for (int j = team.rank; j < n; j += team.size) v.x_o[j] = scale.d[j] * at.x[j];
            for (int e = team.rank; e < p; e += team.size) v.eq_o[e] = scale.rows[e] * at.nu[e] / scale.cost;
            for (int k = team.rank; k < m; k += team.size) v.lam_o[k] = scale.rows[p + k] * at.force[k] / scale.cost;
            team.sync();
        }
    }
    write_gradients(team, z, task, at, kept, i);
}

}  // namespace diffopt
