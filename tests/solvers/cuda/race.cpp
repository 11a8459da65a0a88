// A program for a thread sanitizer: solves and differentiates a few problems with several threads, in all variants. Exits
// with 1 where one is left unsolved; the sanitizer exits with 66 after reporting a race.
#include <array>
#include <cstdio>
#include <random>

#include "shim.hpp"

#include "kernels.cu"

namespace {

using Real = DIFFOPT_REAL;

constexpr int BATCH = 3;  // of two teams the first has two problems

struct Words {
    std::vector<long long> all;
    void add(long long v) { all.push_back(v); }
    void add(double v) { all.push_back(std::bit_cast<long long>(v)); }
    template <class T>
    void add(std::vector<T>& v) {
        add((long long)(v.data()));
    }
    void add(std::vector<Real>& v, long long stride) { add(v), add(stride); }
};

std::vector<Real> drawn(int count, std::mt19937& source, double low = -1, double high = 1) {
    std::uniform_real_distribution<double> from(low, high);
    std::vector<Real> v(count);
    for (Real& x : v) x = Real(from(source));
    return v;
}

template <class Solve, class PullBack>
int run(Solve solve, PullBack pull_back, diffopt::Variant variant, int N, int P, int M, bool two_sided) {
    const bool block = variant != diffopt::Variant::warp, large = variant == diffopt::Variant::large;
    const int threads = 2 * DIFFOPT_WARP, grid = block ? 2 : 1, team = block ? threads : DIFFOPT_WARP;
    std::mt19937 source(0);
    auto A = drawn(BATCH * P * N, source), G = drawn(BATCH * M * N, source), q = drawn(BATCH * N, source, -5, 5);
    auto b = drawn(BATCH * P, source), h = drawn(BATCH * M, source, 0, 1), lower = drawn(BATCH * N, source, -1, -0.5);
    auto upper = drawn(BATCH * N, source, 0.5, 1);
    std::vector<Real> Q(BATCH * N * N);
    for (int i = 0; i < BATCH; ++i) {
        auto U = drawn(N * N, source);
        for (int j = 0; j < N * N; ++j) {
            for (int k = 0; k < N; ++k) Q[i * N * N + j] += U[j / N * N + k] * U[j % N * N + k];
            Q[i * N * N + j] += j / N == j % N ? Real(0.1) : Real(0);
        }
    }
    const diffopt::Sizes z(N, P, M, true, two_sided);
    std::vector<double> kept(BATCH * diffopt::Kept::size(z)), residuals(3 * BATCH);
    std::vector<double> workspace(grid * diffopt::Memory::far(z));
    std::vector<int> lists(BATCH * (z.c + 1)), unsolved(1);
    std::vector<Real> x(BATCH * N), s(BATCH * M), lam(BATCH * M), nu(BATCH * P), low(BATCH * N), up(BATCH * N);
    std::vector<signed char> status(BATCH);
    std::vector<long long> counts(3 * BATCH);

    const long long doubles = diffopt::Memory::size(z, team, large);
    for (long long keep : {0, 1}) {
        Words words;
        words.add(Q, N * N), words.add(q, N), words.add(A, P * N), words.add(b, P), words.add(G, M * N), words.add(h, M);
        words.add(lower, N);
        if (two_sided) words.add(upper, N);
        else words.add(0LL), words.add(0LL);
        for (int v : {N, P, M, BATCH}) words.add((long long)v);
        words.add(kept), words.add(lists), words.add(keep), words.add(workspace);
        words.add(x), words.add(s), words.add(lam), words.add(nu), words.add(low), words.add(up);
        words.add(status), words.add(counts), words.add(residuals), words.add(unsolved);
        words.add(60LL), words.add(1e-9), words.add(sizeof(Real) == sizeof(double) ? 1e-9 : 1e-5), words.add(1e-7);
        words.add(doubles);
        shim::launch(solve, grid, threads, 8 * doubles * (block ? 1 : 2), words.all.data(), true);
        if (unsolved[0]) return 1;
    }

    auto g_x = drawn(BATCH * N, source), g_s = drawn(BATCH * M, source);
    std::vector<Real> dQ(BATCH * N * N), dq(BATCH * N), dA(BATCH * P * N), db(BATCH * P), dG(BATCH * M * N);
    std::vector<Real> dh(BATCH * M), dlower(BATCH * N);
    Words back;
    back.add(Q, N * N), back.add(A, P * N), back.add(G, M * N), back.add(h, M);
    for (int v : {1, N, P, M, BATCH}) back.add((long long)v);
    back.add(kept), back.add(lists), back.add(1LL), back.add(g_x), back.add(g_s);
    for (int k = 0; k < 4; ++k) back.add(0LL);
    back.add(dQ), back.add(dq), back.add(dA), back.add(db), back.add(dG), back.add(dh), back.add(dlower);
    back.add(0LL), back.add(0LL);
    const long long backward = diffopt::BackwardMemory::size(z, team, large);
    back.add(backward);
    shim::launch(pull_back, grid, threads, 8 * backward * (block ? 1 : 2), back.all.data(), true);
    for (Real v : dQ) {
        if (!diffopt::finite(v)) return 1;
    }
    return 0;
}

}  // namespace

int main() {
    using namespace diffopt;
    int failed = 0;
    // More rows than a panel and a tile; two bounds of each variable, no equalities, and one row more than a panel; and fewer
    // variables than threads, where several share a column.
    for (auto [n, p, m, both] : {std::array{26, 2, 8, 0}, std::array{17, 0, 9, 1}, std::array{3, 1, 1, 0}}) {
        failed |= run(diffopt_solve_block, diffopt_pullback_block, Variant::block, n, p, m, both);
        failed |= run(diffopt_solve_warp, diffopt_pullback_warp, Variant::warp, n, p, m, both);
        failed |= run(diffopt_solve_large, diffopt_pullback_large, Variant::large, n, p, m, both);
    }
    std::printf(failed ? "failed\n" : "solved\n");
    return failed;
}
