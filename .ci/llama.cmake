# Of llama.cpp the tests need the library alone, not what its programs share.
set(LLAMA_BUILD_COMMON OFF)
