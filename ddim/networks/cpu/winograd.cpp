// The loops of Winograd's algorithm; called by winograd.py.
//
// Each transform is M X M^T, for a fixed matrix M and the tiles X of the images.

#include "vector.h"

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// The matrices of F(4x4, 3x3) in Lavin and Gray's paper: B^T, G and A^T.
struct Bt {
  static constexpr int rows = 6, columns = 6;
  static constexpr double m[rows][columns] = {{4, 0, -5, 0, 1, 0},   {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                              {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
};
struct G {
  static constexpr int rows = 6, columns = 3;
  static constexpr double m[rows][columns] = {{1. / 4, 0, 0},
                                              {-1. / 6, -1. / 6, -1. / 6},
                                              {-1. / 6, 1. / 6, -1. / 6},
                                              {1. / 24, 1. / 12, 1. / 6},
                                              {1. / 24, -1. / 12, 1. / 6},
                                              {0, 0, 1}};
};
struct At {
  static constexpr int rows = 4, columns = 6;
  static constexpr double m[rows][columns] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
};
template <class M>
struct Transposed {
  static constexpr int rows = M::columns, columns = M::rows;
  struct Rows {
    struct Row {
      int r;
      constexpr double operator[](int k) const { return M::m[k][r]; }
    };
    constexpr Row operator[](int r) const { return {r}; }
  };
  static constexpr Rows m{};
};

// y = M x, where each entry of x is a vector of channels; zero entries of M are skipped at compile time.
template <class M, int stride, typename T>
inline __attribute__((always_inline)) void combine(const typename Vector<T>::type* x, typename Vector<T>::type* y) {
#pragma GCC unroll 6
  for (int r = 0; r < M::rows; r++) {
    typename Vector<T>::type sum = {};
    bool first = true;
#pragma GCC unroll 6
    for (int k = 0; k < M::columns; k++) {
      if (M::m[r][k] == 0) continue;
      const typename Vector<T>::type term = x[k] * T(M::m[r][k]);
      sum = first ? term : sum + term;
      first = false;
    }
    y[r * stride] = sum;
  }
}

// out = M in M^T + bias, for all channels of one tile.
template <class M, typename T>
inline void sandwich(const T* in, int64_t in_row, int64_t in_column, T* out, int64_t out_row, int64_t out_column,
                     int64_t channels, const T* bias) {
  typedef typename Vector<T>::type V;
  constexpr int R = M::rows, K = M::columns;
  for (int64_t c = 0; c < channels; c += LANES<T>) {
    V half[R * K], column[K], row[R];
#pragma GCC unroll 6
    for (int k = 0; k < K; k++) {
#pragma GCC unroll 6
      for (int i = 0; i < K; i++) column[i] = at(in + i * in_row + k * in_column + c);
      combine<M, K, T>(column, half + k);
    }
    const V plus = bias ? at(bias + c) : V{};
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      combine<M, 1, T>(half + r * K, row);
#pragma GCC unroll 6
      for (int s = 0; s < R; s++) at(out + r * out_row + s * out_column + c) = row[s] + plus;
    }
  }
}

// images (n, H, W, C), padded by `border` zeros -> tiles (36, n H/step W/step, C); the 36 matrices are `pitch` apart.
template <class M, int step, int border, typename T>
void cut(const T* images, T* tiles, int64_t n, int64_t H, int64_t W, int64_t C, int64_t pitch, int64_t threads) {
  const int64_t h = H / step, w = W / step, padded_width = W + 2 * border;
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> copy(border ? M::columns * padded_width * C : 0);  // one row of tiles with its padding
#pragma omp for
    for (int64_t k = 0; k < n * h; k++) {
      const int64_t top = k % h * step - border;
      const T* rows = images + (k / h * H + top) * W * C;
      if (border) {
        for (int64_t i = 0; i < M::columns; i++) {
          T* to = copy.data() + (i * padded_width + border) * C;
          if (top + i < 0 || top + i >= H)
            memset(to, 0, W * C * sizeof(T));
          else
            memcpy(to, rows + i * W * C, W * C * sizeof(T));
        }
        rows = copy.data();
      }
      for (int64_t j = 0; j < w; j++)
        sandwich<M, T>(rows + j * step * C, padded_width * C, C, tiles + (k * w + j) * C, M::rows * pitch, pitch, C,
                       nullptr);
    }
  }
}

// tiles (36, n H/step W/step, C), the 36 matrices `pitch` apart, and a bias (C,) or null -> images (n, H, W, C).
template <class M, typename T>
void join(const T* tiles, const T* bias, T* images, int64_t n, int64_t H, int64_t W, int64_t C, int64_t pitch,
          int64_t threads) {
  constexpr int step = M::rows;
  const int64_t h = H / step, w = W / step;
#pragma omp parallel for num_threads(threads)
  for (int64_t k = 0; k < n * h; k++)
    for (int64_t j = 0; j < w; j++)
      sandwich<M, T>(tiles + (k * w + j) * C, M::columns * pitch, pitch, images + (k * W + j) * step * C, W * C, C, C,
                     bias);
}

// Columns of a product that are computed together: with six rows their sums fill the vector registers.
template <typename T>
constexpr int PANEL = 2 * LANES<T>;

// weights (N, 3, 3, K) -> G g G^T of each filter, (36, N/PANEL, K, PANEL): the order in which `products` reads them.
// With `turned`: weights (K, 3, 3, N), and each filter is first turned by half a turn. Some filters are transformed at a
// time, then copied: the 36 matrices often lie a power of two apart, where they would evict each other from the cache.
template <typename T>
void filters(const T* weights, T* panels, int64_t K, int64_t N, bool turned, int64_t threads) {
  constexpr int P = PANEL<T>, ROWS = 8;
#pragma omp parallel for num_threads(threads) collapse(2)
  for (int64_t n = 0; n < N; n += P)
    for (int64_t k = 0; k < K; k += ROWS) {
      T in[ROWS][9][P], out[36][ROWS][P];
      for (int g = 0; g < 9; g++)
        if (turned)
          for (int j = 0; j < ROWS; j++) memcpy(in[j][8 - g], weights + ((k + j) * 9 + g) * N + n, sizeof in[j][g]);
        else
          for (int i = 0; i < P; i++)
            for (int j = 0; j < ROWS; j++) in[j][g][i] = weights[((n + i) * 9 + g) * K + k + j];
      for (int j = 0; j < ROWS; j++)
        sandwich<G, T>(in[j][0], 3 * P, P, out[0][j], 6 * ROWS * P, ROWS * P, P, nullptr);
      for (int part = 0; part < 36; part++)
        memcpy(panels + part * K * N + n * K + k * P, out[part], sizeof out[part]);
    }
}

// R rows of a product: a (R, K) times a panel (K, PANEL) -> c (R, PANEL), whose rows are N apart.
template <int R, typename T>
inline __attribute__((always_inline)) void multiply(const T* a, const T* panel, T* c, int64_t K, int64_t N) {
  typename Vector<T>::type left[R] = {}, right[R] = {};
  for (int64_t k = 0; k < K; k++) {
    const auto l = at(panel + k * PANEL<T>), r = at(panel + k * PANEL<T> + LANES<T>);
#pragma GCC unroll 6
    for (int i = 0; i < R; i++) {
      left[i] += a[i * K + k] * l;
      right[i] += a[i * K + k] * r;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; i++) {
    at(c + i * N) = left[i];
    at(c + i * N + LANES<T>) = right[i];
  }
}

// 36 matrix products, a (36, M, K) times panels (36, N/PANEL, K, PANEL) -> c (36, M, N). The 36 matrices of a and c are
// `pitch_a` and `pitch_c` apart. A row of c depends on the same row of a only, bit for bit.
template <typename T>
void products(const T* a, const T* panels, T* c, int64_t M, int64_t K, int64_t N, int64_t pitch_a, int64_t pitch_c,
              int64_t threads) {
#pragma omp parallel for num_threads(threads) collapse(2)
  for (int64_t part = 0; part < 36; part++)
    for (int64_t n = 0; n < N; n += PANEL<T>) {
      const T *in = a + part * pitch_a, *panel = panels + part * K * N + n * K;
      T* out = c + part * pitch_c + n;
      int64_t m = 0;
      for (; m + 6 <= M; m += 6) multiply<6>(in + m * K, panel, out + m * N, K, N);
      for (; m + 4 <= M; m += 4) multiply<4>(in + m * K, panel, out + m * N, K, N);
      for (; m < M; m++) multiply<1>(in + m * K, panel, out + m * N, K, N);
    }
}

}  // namespace

#define SIZES int64_t n, int64_t H, int64_t W, int64_t C, int64_t pitch, int64_t threads
#define BOTH(T)                                                                                                     \
  extern "C" void input_tiles_##T(const T* images, T* tiles, SIZES) {                                               \
    cut<Bt, 4, 1>(images, tiles, n, H, W, C, pitch, threads);                                                       \
  }                                                                                                                 \
  extern "C" void spread_tiles_##T(const T* images, T* tiles, SIZES) {                                              \
    cut<Transposed<At>, 4, 0>(images, tiles, n, H, W, C, pitch, threads);                                           \
  }                                                                                                                 \
  extern "C" void output_##T(const T* tiles, const T* bias, T* images, SIZES) {                                     \
    join<At>(tiles, bias, images, n, H, W, C, pitch, threads);                                                      \
  }                                                                                                                 \
  extern "C" void weights_##T(const T* tiles, const T* bias, T* images, SIZES) {                                    \
    join<Transposed<G>>(tiles, bias, images, n, H, W, C, pitch, threads);                                           \
  }                                                                                                                 \
  extern "C" void filters_##T(const T* weights, T* panels, int64_t K, int64_t N, int64_t turned, int64_t threads) { \
    filters(weights, panels, K, N, turned, threads);                                                                \
  }                                                                                                                 \
  extern "C" void products_##T(const T* a, const T* panels, T* c, int64_t M, int64_t K, int64_t N, int64_t pitch_a, \
                               int64_t pitch_c, int64_t threads) {                                                  \
    products(a, panels, c, M, K, N, pitch_a, pitch_c, threads);                                                     \
  }
BOTH(float)
BOTH(double)
