//! The widest load that every processor of the architecture supports: wider loads keep more cache misses in
//! flight.

#[cfg(target_arch = "x86_64")]
mod arch {
    #![expect(unsafe_code, reason = "instructions of SSE2, which every x86-64 has")]

    use std::arch::x86_64::{__m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128};

    pub(in crate::memory) type Wide = __m128i;

    pub(in crate::memory) fn zeros() -> Wide {
        // SAFETY: every x86-64 processor has SSE2.
        unsafe { _mm_setzero_si128() }
    }

    pub(in crate::memory) fn either(one: Wide, other: Wide) -> Wide {
        // SAFETY: every x86-64 processor has SSE2.
        unsafe { _mm_or_si128(one, other) }
    }

    pub(in crate::memory) fn is_zero(wide: Wide) -> bool {
        // SAFETY: every x86-64 processor has SSE2.
        let equal = unsafe { _mm_cmpeq_epi8(wide, zeros()) };
        // SAFETY: every x86-64 processor has SSE2.
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
