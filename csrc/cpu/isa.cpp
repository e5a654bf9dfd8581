#include "isa.hpp"

#include <atomic>
#include <stdexcept>

#if defined(LOWBIT_X86_LEVELS)
#include <cpuid.h>
#endif
#if defined(LOWBIT_AMX_LEVEL)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit {

namespace baseline {
extern const CodecKernels codec_kernels;
extern const RotationKernel rotation_kernel;
extern const ProductKernels product_kernels;
}  // namespace baseline
#if defined(LOWBIT_X86_LEVELS)
namespace avx2 {
extern const CodecKernels codec_kernels;
extern const RotationKernel rotation_kernel;
extern const ProductKernels product_kernels;
}  // namespace avx2
namespace avx512 {
extern const CodecKernels codec_kernels;
extern const RotationKernel rotation_kernel;
extern const ProductKernels product_kernels;
}  // namespace avx512
namespace avx512vnni {
extern const ProductKernels product_kernels;
}  // namespace avx512vnni
#endif
#if defined(LOWBIT_BF16_LEVEL)
namespace avx512bf16 {
extern const ProductKernels product_kernels;
}  // namespace avx512bf16
#endif
#if defined(LOWBIT_AMX_LEVEL)
namespace amx {
extern const TileKernels tile_kernels;
}  // namespace amx
#endif

namespace {

struct Level {
    const char* name;
    bool supported;
    const CodecKernels* codec;
    RotationKernel rotation;
    const ProductKernels* product;
    const ProductKernels* vectors;
};

#if defined(LOWBIT_X86_LEVELS)
// Not every compiler knows these two in __builtin_cpu_supports.
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif
#if defined(LOWBIT_BF16_LEVEL)
// Leaf 7, subleaf 1, bit 5 of EAX. (That the system keeps the registers, AVX-512 says already.)
bool has_bf16() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && eax >= 1 &&
           __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 5)) != 0;
}
#endif

#if defined(LOWBIT_AMX_LEVEL)
// Leaf 7, bits 22, 24 and 25 of EDX: bfloat16, tiles, int8. Linux hands the tiles' registers to a
// process that asks for them (from 5.16 on; ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA).
bool has_amx() {
    constexpr unsigned needed = (1u << 22) | (1u << 24) | (1u << 25);
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & needed) == needed &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

const ProductKernels& amx_kernels() {
    static const ProductKernels kernels = [] {
        ProductKernels changed = avx512bf16::product_kernels;
        changed.offset = false;
        changed.tile_steps = amx::tile_kernels.steps;
        changed.turn_strip = amx::tile_kernels.turn_strip;
        changed.multiply = amx::tile_kernels.multiply;
        return changed;
    }();
    return kernels;
}
#endif

// The conditions repeat the compiler flags of each level in setup.py.
const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found;
        const auto add = [&](const char* name, bool supported, const CodecKernels& codec,
                             RotationKernel rotation, const ProductKernels& vectors,
                             const ProductKernels* product = nullptr) {
            found.push_back({name, supported, &codec, rotation,
                             product == nullptr ? &vectors : product, &vectors});
        };
        add("baseline", true, baseline::codec_kernels, baseline::rotation_kernel,
            baseline::product_kernels);
#if defined(LOWBIT_X86_LEVELS)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi2") && has_f16c();
        const bool avx512 =
            avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
        add("avx2", avx2, avx2::codec_kernels, avx2::rotation_kernel, avx2::product_kernels);
        add("avx512", avx512, avx512::codec_kernels, avx512::rotation_kernel,
            avx512::product_kernels);
        // What the others add multiplies integers or bfloat16; codec and rotation are avx512's.
        add("avx512vnni", vnni, avx512::codec_kernels, avx512::rotation_kernel,
            avx512vnni::product_kernels);
#if defined(LOWBIT_BF16_LEVEL)
        const bool bf16 = vnni && has_bf16();
        add("avx512bf16", bf16, avx512::codec_kernels, avx512::rotation_kernel,
            avx512bf16::product_kernels);
#if defined(LOWBIT_AMX_LEVEL)
        add("amx", bf16 && has_amx(), avx512::codec_kernels, avx512::rotation_kernel,
            avx512bf16::product_kernels, &amx_kernels());
#endif
#endif
#endif
        return found;
    }();
    return all;
}

std::atomic<const Level*>& current() {
    static std::atomic<const Level*> level = [] {
        const Level* best = nullptr;
        for (const Level& candidate : levels()) {
            if (candidate.supported) {
                best = &candidate;
            }
        }
        return best;
    }();
    return level;
}

}  // namespace

const CodecKernels& codec_kernels() {
    return *current().load()->codec;
}

RotationKernel rotation_kernel() {
    return current().load()->rotation;
}

const ProductKernels& product_kernels() {
    return *current().load()->product;
}

const ProductKernels& vector_kernels() {
    return *current().load()->vectors;
}

std::string current_isa() {
    return current().load()->name;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Level& level : levels()) {
        if (level.supported) {
            names.push_back(level.name);
        }
    }
    return names;
}

void set_isa(const std::string& name) {
    std::string supported;
    for (const Level& level : levels()) {
        if (!level.supported) {
            continue;
        }
        if (name == level.name) {
            current().store(&level);
            return;
        }
        supported += (supported.empty() ? "" : ", ") + std::string(level.name);
    }
    throw std::invalid_argument("ISA level: expected one that this machine supports (" + supported +
                                "), got '" + name + "'");
}

}  // namespace lowbit
