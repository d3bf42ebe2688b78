// A gated activation, as tda::GatedActivation computes it, also for products that make their own.
#ifdef TDA_ACTIVATION

// The product of rounded activations, as separate operators compute it.
static __device__ __forceinline__ float Gated(float gate, float up) { return ToFloat(FromFloat(Activate(gate))) * up; }

#endif
