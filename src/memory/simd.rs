//! As many bytes as any processor of the architecture loads at once: the fewer loads, the more lines of memory are waited for together.

#[cfg(target_arch = "x86_64")]
mod arch {
    #![expect(unsafe_code, reason = "instructions of SSE2, which every x86-64 has")]

    use std::arch::x86_64::{__m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128};

    pub(in crate::memory) type Wide = __m128i;

    pub(in crate::memory) fn zeros() -> Wide {
        // SAFETY: SSE2 is there.
        unsafe { _mm_setzero_si128() }
    }

    pub(in crate::memory) fn either(one: Wide, other: Wide) -> Wide {
        // SAFETY: SSE2 is there.
        unsafe { _mm_or_si128(one, other) }
    }

    pub(in crate::memory) fn is_zero(wide: Wide) -> bool {
        // SAFETY: SSE2 is there.
        let equal = unsafe { _mm_cmpeq_epi8(wide, zeros()) };
        // SAFETY: SSE2 is there.
        let bytes = unsafe { _mm_movemask_epi8(equal) };
        bytes == 0xffff
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod arch {
    pub(in crate::memory) type Wide = u64;

    pub(in crate::memory) fn zeros() -> Wide {
        0
    }

    pub(in crate::memory) fn either(one: Wide, other: Wide) -> Wide {
        one | other
    }

    pub(in crate::memory) fn is_zero(wide: Wide) -> bool {
        wide == 0
    }
}

pub(super) use self::arch::{Wide, either, is_zero, zeros};
