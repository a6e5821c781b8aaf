"""The only rooms that know Ray and the process group."""
