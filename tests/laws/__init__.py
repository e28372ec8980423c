"""The laws of a mapping, kind by kind, and a fuzzer whose expected values share no code with the library."""
