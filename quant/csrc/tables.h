// The numbers of quant/codes.py; tests/test_quant_contract.py holds the two together.
#pragma once
#include <cmath>
#include <cstdint>

// What codes CODE_NF4 .. CODE_FP4 stand for.
static const float kValues[4][16] = {
    {-0x1.000000p+0f, -0x1.647362p-1f, -0x1.0cd660p-1f, -0x1.946540p-2f, -0x1.23449ap-2f, -0x1.7a6a7ep-3f, -0x1.74f0e2p-4f, 0x0.0p+0f, 0x1.45f5fep-4f, 0x1.4995c6p-3f, 0x1.f809bap-3f, 0x1.5a0674p-2f, 0x1.c34970p-2f, 0x1.200f56p-1f, 0x1.722766p-1f, 0x1.000000p+0f},
    {-0x1.000000p+3f, -0x1.c00000p+2f, -0x1.800000p+2f, -0x1.400000p+2f, -0x1.000000p+2f, -0x1.800000p+1f, -0x1.000000p+1f, -0x1.000000p+0f, 0x0.0p+0f, 0x1.000000p+0f, 0x1.000000p+1f, 0x1.800000p+1f, 0x1.000000p+2f, 0x1.400000p+2f, 0x1.800000p+2f, 0x1.c00000p+2f},
    {0x0.0p+0f, 0x1.000000p-1f, 0x1.000000p+0f, 0x1.800000p+0f, 0x1.000000p+1f, 0x1.800000p+1f, 0x1.000000p+2f, 0x1.800000p+2f, -0x0.0p+0f, -0x1.000000p-1f, -0x1.000000p+0f, -0x1.800000p+0f, -0x1.000000p+1f, -0x1.800000p+1f, -0x1.000000p+2f, -0x1.800000p+2f},
    {0x0.0p+0f, 0x1.555556p-8f, 0x1.555556p-1f, 0x1.000000p+0f, 0x1.555556p-2f, 0x1.000000p-1f, 0x1.555556p-3f, 0x1.000000p-2f, -0x0.0p+0f, -0x1.555556p-8f, -0x1.555556p-1f, -0x1.000000p+0f, -0x1.555556p-2f, -0x1.000000p-1f, -0x1.555556p-3f, -0x1.000000p-2f},
};
// The same as 16-bit integers, and what one step of them stands for. nf4's are rounded: of all multipliers up to 8191,
// which keep eight products with 16-bit activations within 32 bits, 8005 leaves the smallest error, 4e-5 of the largest.
static const int16_t kIntegerValues[4][16] = {
    {-8005, -5573, -4203, -3161, -2277, -1479, -729, 0, 637, 1288, 1970, 2705, 3528, 4504, 5787, 8005},
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
    {0, 1, 128, 192, 64, 96, 32, 48, 0, -1, -128, -192, -64, -96, -32, -48},
};
static const float kIntegerSteps[4] = {1.0f / 8005, 1.0f, 0.5f, 1.0f / 192};
static const float kNf4Bounds[15] = {-0x1.b239b0p-1f, -0x1.38a4e0p-1f, -0x1.d70900p-2f, -0x1.5bd4ecp-2f, -0x1.e079d8p-3f, -0x1.1a7178p-3f, -0x1.74f0e2p-5f, 0x1.45f5fep-5f, 0x1.ec90c4p-4f, 0x1.a0cfc0p-3f, 0x1.2b05a8p-2f, 0x1.8ea7f2p-2f, 0x1.00da08p-1f, 0x1.491b5ep-1f, 0x1.b913b4p-1f};
static const float kE2m1Bounds[15] = {-0x1.400002p+2f, -0x1.c00000p+1f, -0x1.400002p+1f, -0x1.c00000p+0f, -0x1.400002p+0f, -0x1.800000p-1f, -0x1.000002p-2f, 0x1.000000p-2f, 0x1.7ffffep-1f, 0x1.400000p+0f, 0x1.bffffep+0f, 0x1.400000p+1f, 0x1.bffffep+1f, 0x1.400000p+2f, INFINITY};
static const float kFp4Bounds[15] = {-0x1.aaaaacp-1f, -0x1.2aaaacp-1f, -0x1.aaaaacp-2f, -0x1.2aaaacp-2f, -0x1.aaaaacp-3f, -0x1.600000p-4f, -0x1.555556p-9f, 0x0.0p+0f, 0x1.555556p-9f, 0x1.600000p-4f, 0x1.aaaaacp-3f, 0x1.2aaaacp-2f, 0x1.aaaaacp-2f, 0x1.2aaaacp-1f, 0x1.aaaaacp-1f};
static const unsigned char kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
// The tables of CODE_NF3, in units of 1/128.
static const int16_t kNf3Values[16][8] = {
    {-196, -128, -78, -34, 10, 54, 103, 164},
    {-243, -160, -96, -41, 13, 69, 132, 219},
    {-246, -143, -81, -31, 14, 59, 111, 179},
    {-297, -195, -115, -48, 16, 83, 162, 275},
    {-313, -175, -98, -37, 19, 73, 135, 213},
    {-379, -216, -123, -48, 19, 88, 167, 271},
    {-482, -259, -144, -58, 20, 102, 201, 347},
    {-164, -103, -54, -10, 34, 78, 128, 196},
    {-219, -132, -69, -13, 41, 96, 160, 243},
    {-179, -111, -59, -14, 31, 81, 143, 246},
    {-275, -162, -83, -16, 48, 115, 195, 297},
    {-213, -135, -73, -19, 37, 98, 175, 313},
    {-271, -167, -88, -19, 48, 123, 216, 379},
    {-347, -201, -102, -20, 58, 144, 259, 482},
    {-1152, -410, -166, -51, 51, 166, 410, 1152},
    {-7168, -2304, -768, -102, 0, 102, 1792, 5120},
};
