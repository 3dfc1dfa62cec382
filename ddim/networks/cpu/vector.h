// A vector type as long as the processor's vector registers.

#pragma once

#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};
template <typename T>
constexpr int LANES = BYTES / sizeof(T);

template <typename T>
inline typename Vector<T>::type& at(T* p) {
  return *(typename Vector<T>::type*)p;
}
template <typename T>
inline typename Vector<T>::type at(const T* p) {
  return *(const typename Vector<T>::type*)p;
}
