// The activation functions of FFNs. TDA_ACTIVATION says which: 0 silu, 1 gelu, 2 gelu by tanh, 3 relu.
#ifdef TDA_ACTIVATION

static __device__ __forceinline__ float Activate(float value) {
#if TDA_ACTIVATION == 0
  return value / (1.0f + __expf(-value));
#elif TDA_ACTIVATION == 1
  return 0.5f * value * (1.0f + erff(value * 0.70710678f));
#elif TDA_ACTIVATION == 2
  return 0.5f * value * (1.0f + tanhf(0.79788456f * (value + 0.044715f * value * value * value)));
#else
  return fmaxf(value, 0.0f);
#endif
}

#endif
