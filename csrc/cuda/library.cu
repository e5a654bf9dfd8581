// What is no kernel: the version of the launchers' interface, the words for an error, and a probe.
#include "rows.cuh"

namespace lowbit {
namespace {

__global__ void __launch_bounds__(kWarpThreads) probe() {}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

// As lowbit_muon/backends/cuda/library.py expects it; a change of any launcher's arguments raises
// both.
int lowbit_interface_version() {
    return 2;
}

const char* lowbit_error_string(int code) {
    if (code == kBadArgument) {
        return "a size is outside of what the kernel takes";
    }
#if defined(__CUDACC__)
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return emulation_failure.c_str();
#endif
}

// Launches a kernel that does nothing.
int lowbit_probe(void* stream) {
    return launch(probe, {dim3(1), kWarpThreads, 0}, stream);
}

#if !defined(__CUDACC__)
void lowbit_emulation_schedule(unsigned seed) {
    emulation::machine.schedule = seed;
}
#endif

}  // extern "C"
