// Group normalisation and SiLU in one pass, forward and backward; called by norm_silu.py.

#include "vector.h"

#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

// e^x, accurate to two units in the last place: 2^n e^r with |r| <= ln(2)/2, and e^r by its Taylor polynomial.
inline Vector<float>::type exponential(Vector<float>::type x) {
  typedef Vector<float>::type V;
  typedef int32_t I __attribute__((vector_size(BYTES)));
  x = x < -87.0f ? V{} - 87.0f : x;
  x = x > 88.0f ? V{} + 88.0f : x;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V n = (x * 1.44269504f + rounding) - rounding;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
}

inline Vector<double>::type exponential(Vector<double>::type x) {
  for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
  return x;
}

// Sums over pixels for each channel: 64 pixels at a time in T (`few`), these partial sums in double (`all`).
template <typename T>
struct Sums {
  std::vector<T> few;
  std::vector<double> all;
  explicit Sums(int64_t channels) : few(channels), all(channels) {}
  void flush() {
    for (size_t c = 0; c < few.size(); c++) all[c] += few[c], few[c] = 0;
  }
};

// The number of channels that one thread processes: all of an image's, or, with fewer images than threads, the fewest
// that are complete groups and complete cache lines.
template <typename T>
int64_t channels_per_thread(int64_t n, int64_t C, int64_t groups, int64_t threads) {
  return n >= threads ? C : std::lcm<int64_t>(C / groups, 64 / sizeof(T));
}

// Call body(p) for all pixels, and flush() after every 64 of them and at the end.
template <typename Body, typename Flush>
inline void for_each_pixel(int64_t pixels, Body body, Flush flush) {
  for (int64_t p = 0; p < pixels; p++) {
    body(p);
    if (p % 64 == 63 || p == pixels - 1) flush();
  }
}

// x (n, P, C), gamma and beta (C,) -> y (n, P, C), and (n, groups) each: mean and 1 / standard deviation of the groups.
template <typename T>
void forward(const T* x, const T* gamma, const T* beta, T* y, T* mean, T* rstd, int64_t n, int64_t P, int64_t C,
             int64_t groups, double eps, int64_t threads) {
  const int64_t width = channels_per_thread<T>(n, C, groups, threads), parts = C / width, per = C / groups;
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < n * parts; item++) {
    const int64_t first = item % parts * width, start = item / parts * P * C + first;
    const int64_t group = (item / parts) * groups + first / per;
    const T* in = x + start;
    Sums<T> sums(width), squares(width);
    std::vector<T> center(width), scale(width), shift(width);
    for_each_pixel(
        P, [&](int64_t p) {
          for (int64_t c = 0; c < width; c += LANES<T>) at(&sums.few[c]) += at(in + p * C + c);
        },
        [&] { sums.flush(); });
    for (int64_t g = 0; g < width / per; g++) {
      double sum = 0;
      for (int64_t c = g * per; c < (g + 1) * per; c++) sum += sums.all[c];
      mean[group + g] = sum / (P * per);
      for (int64_t c = g * per; c < (g + 1) * per; c++) center[c] = mean[group + g];
    }
    for_each_pixel(
        P, [&](int64_t p) {
          for (int64_t c = 0; c < width; c += LANES<T>) {
            const auto d = at(in + p * C + c) - at(&center[c]);
            at(&squares.few[c]) += d * d;
          }
        },
        [&] { squares.flush(); });
    for (int64_t g = 0; g < width / per; g++) {
      double sum = 0;
      for (int64_t c = g * per; c < (g + 1) * per; c++) sum += squares.all[c];
      rstd[group + g] = 1 / std::sqrt(sum / (P * per) + eps);
      for (int64_t c = g * per; c < (g + 1) * per; c++) {
        scale[c] = rstd[group + g] * gamma[first + c];
        shift[c] = beta[first + c];
      }
    }
    for (int64_t p = 0; p < P; p++)
      for (int64_t c = 0; c < width; c += LANES<T>) {
        const auto z = (at(in + p * C + c) - at(&center[c])) * at(&scale[c]) + at(&shift[c]);
        at(y + start + p * C + c) = z / (T(1) + exponential(-z));
      }
  }
}

// The gradient of y, and the inputs and moments of `forward` -> the gradients of x (n, P, C), and of gamma and beta for
// each image (n, C). With xh = (x - mean) rstd, z = xh gamma + beta, s = sigmoid(z) and dz = dy s (1 + z (1 - s)):
// dx = rstd (gamma dz - mean of gamma dz - xh mean of (gamma dz xh)), the means over a group.
template <typename T>
void backward(const T* dy, const T* x, const T* gamma, const T* beta, const T* mean, const T* rstd, T* dx, T* dgamma,
              T* dbeta, int64_t n, int64_t P, int64_t C, int64_t groups, int64_t threads) {
  const int64_t width = channels_per_thread<T>(n, C, groups, threads), parts = C / width, per = C / groups;
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < n * parts; item++) {
    const int64_t image = item / parts, first = item % parts * width, start = image * P * C + first;
    Sums<T> by_gamma(width), by_beta(width);
    std::vector<T> center(width), scale(width), mean_dz(width), mean_dz_xh(width);
    for (int64_t c = 0; c < width; c++) {
      const int64_t group = image * groups + (first + c) / per;
      center[c] = mean[group], scale[c] = rstd[group];
    }
    for_each_pixel(
        P, [&](int64_t p) {
          for (int64_t c = 0; c < width; c += LANES<T>) {
            const int64_t i = start + p * C + c;
            const auto xh = (at(x + i) - at(&center[c])) * at(&scale[c]);
            const auto z = xh * at(gamma + first + c) + at(beta + first + c);
            const auto s = T(1) / (T(1) + exponential(-z));
            const auto dz = at(dy + i) * s * (T(1) + z * (T(1) - s));
            at(dx + i) = dz;
            at(&by_beta.few[c]) += dz;
            at(&by_gamma.few[c]) += dz * xh;
          }
        },
        [&] { by_gamma.flush(), by_beta.flush(); });
    for (int64_t g = 0; g < width; g += per) {
      double sum_dz = 0, sum_dz_xh = 0;
      for (int64_t c = g; c < g + per; c++) {
        sum_dz += gamma[first + c] * by_beta.all[c];
        sum_dz_xh += gamma[first + c] * by_gamma.all[c];
      }
      for (int64_t c = g; c < g + per; c++) {
        mean_dz[c] = sum_dz / (P * per), mean_dz_xh[c] = sum_dz_xh / (P * per);
        dgamma[image * C + first + c] = by_gamma.all[c], dbeta[image * C + first + c] = by_beta.all[c];
      }
    }
    for (int64_t p = 0; p < P; p++)
      for (int64_t c = 0; c < width; c += LANES<T>) {
        const int64_t i = start + p * C + c;
        const auto xh = (at(x + i) - at(&center[c])) * at(&scale[c]);
        at(dx + i) = at(&scale[c]) * (at(gamma + first + c) * at(dx + i) - at(&mean_dz[c]) - xh * at(&mean_dz_xh[c]));
      }
  }
}

}  // namespace

#define BOTH(T)                                                                                                   \
  extern "C" void forward_##T(const T* x, const T* gamma, const T* beta, T* y, T* mean, T* rstd, double eps,      \
                              int64_t n, int64_t P, int64_t C, int64_t groups, int64_t threads) {                 \
    forward<T>(x, gamma, beta, y, mean, rstd, n, P, C, groups, eps, threads);                                     \
  }                                                                                                               \
  extern "C" void backward_##T(const T* dy, const T* x, const T* gamma, const T* beta, const T* mean,             \
                               const T* rstd, T* dx, T* dgamma, T* dbeta, int64_t n, int64_t P, int64_t C,        \
                               int64_t groups, int64_t threads) {                                                 \
    backward<T>(dy, x, gamma, beta, mean, rstd, dx, dgamma, dbeta, n, P, C, groups, threads);                     \
  }
BOTH(float)
BOTH(double)
