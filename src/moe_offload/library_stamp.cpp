// Says which sources a library was built from; see libraries.py. setup.py compiles it into each of them.
#define TEXT_OF(token) #token
#define TEXT(macro) TEXT_OF(macro)

#if defined(_WIN32)
extern "C" __declspec(dllexport)
#else
extern "C" __attribute__((visibility("default")))
#endif
const char* moe_offload_library_stamp() { return TEXT(MOE_OFFLOAD_LIBRARY_STAMP); }
