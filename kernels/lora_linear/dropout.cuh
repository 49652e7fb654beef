// Dropout whose mask is a function of the position: element `index` (row-major) of x is kept when
// uniform(philox4x32_10(key, counter)[index % 4]) >= probability, with key = seed and
// counter = [index / 4 low, index / 4 high, stream, step]. The backward pass replays it. The step is read from
// the device, so that a launch may be repeated as it was for another mask.
#pragma once

#include "abi.h"

// Philox4x32-10 (Salmon et al., 2011).
__device__ inline uint4 philox4x32_10(uint2 key, uint4 counter) {
    for (int round = 0; round < 10; ++round) {
        uint64_t p0 = (uint64_t)0xD2511F53u * counter.x;
        uint64_t p1 = (uint64_t)0xCD9E8D57u * counter.z;
        counter = make_uint4((uint32_t)(p1 >> 32) ^ counter.y ^ key.x, (uint32_t)p1,
                             (uint32_t)(p0 >> 32) ^ counter.w ^ key.y, (uint32_t)p0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

// The step, which a block reads once.
__device__ inline uint32_t step_of(const LoraDropout &dropout) {
    return dropout.probability > 0 ? *reinterpret_cast<const uint32_t *>(dropout.step) : 0;
}

// Bit i: whether element 4 group + i is kept.
__device__ inline uint32_t kept_in_group(const LoraDropout &dropout, uint32_t step, uint64_t group) {
    uint4 words = philox4x32_10(
        make_uint2((uint32_t)dropout.seed, (uint32_t)(dropout.seed >> 32)),
        make_uint4((uint32_t)group, (uint32_t)(group >> 32), dropout.stream, step));
    // The upper 24 bits as a number in [0, 1): both conversions are exact.
    auto kept = [&](uint32_t word) {
        return (uint32_t)((float)(word >> 8) * (1.0f / 16777216.0f) >= dropout.probability);
    };
    return kept(words.x) | kept(words.y) << 1 | kept(words.z) << 2 | kept(words.w) << 3;
}

// Bit i: whether element index + i is kept, for i < 4.
__device__ inline uint32_t kept4(const LoraDropout &dropout, uint32_t step, uint64_t index) {
    uint32_t bits = kept_in_group(dropout, step, index / 4);
    uint32_t lane = index % 4;
    if (lane == 0) return bits;
    return (bits | kept_in_group(dropout, step, index / 4 + 1) << 4) >> lane & 15;
}
