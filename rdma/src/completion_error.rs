//! Why a request failed.

use std::fmt;

use crate::sys::constants as c;

/// A request that failed: the status of the InfiniBand specification and the adapter's own code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompletionError {
    /// What happened.
    pub status: CompletionStatus,
    /// The adapter's own code, for its maker's support; 0 when it gave none.
    pub vendor_code: u32,
}

impl CompletionError {
    pub(crate) fn from_raw(status: u32, vendor_code: u32) -> CompletionError {
        CompletionError { status: CompletionStatus::from_raw(status), vendor_code }
    }
}

impl fmt::Display for CompletionError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.status)?;
        if self.vendor_code != 0 {
            write!(formatter, " (vendor code {:#x})", self.vendor_code)?;
        }
        Ok(())
    }
}

impl std::error::Error for CompletionError {}

/// Declares the statuses with, for each, its C constant and one sentence: what happened, and the usual cause.
macro_rules! statuses {
    ($( $name:ident = $constant:ident : $text:literal )+) => {
        /// Why a request failed (`enum ibv_wc_status`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum CompletionStatus {
            $( #[doc = $text] $name, )+
            /// A status that this version does not know, by number.
            Unknown(u32),
        }

        impl CompletionStatus {
            /// Every status that this version knows, in the order of the header.
            pub const ALL: &[Self] = &[ $( Self::$name, )+ ];

            fn from_raw(raw: u32) -> CompletionStatus {
                match raw {
                    $( c::$constant => CompletionStatus::$name, )+
                    unknown => CompletionStatus::Unknown(unknown),
                }
            }
        }

        impl fmt::Display for CompletionStatus {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $( CompletionStatus::$name => formatter.write_str($text), )+
                    CompletionStatus::Unknown(number) => write!(formatter, "unknown completion status {number}"),
                }
            }
        }
    };
}

statuses! {
    LocalLength = IBV_WC_LOC_LEN_ERR:
        "local length error: a message was longer than its buffer or than the port allows"
    LocalOperation = IBV_WC_LOC_QP_OP_ERR:
        "local queue pair operation error: the device found the request malformed"
    LocalEndToEndContext = IBV_WC_LOC_EEC_OP_ERR:
        "local end-to-end context error: meant for reliable datagrams, which are not used here"
    LocalProtection = IBV_WC_LOC_PROT_ERR:
        "local protection error: the local range is not in a registered region of this protection domain"
    Flushed = IBV_WC_WR_FLUSH_ERR:
        "flushed: the queue pair had failed or was closed before this request; the first other error tells why"
    MemoryWindowBind = IBV_WC_MW_BIND_ERR:
        "memory window bind error: memory windows are not used here"
    BadResponse = IBV_WC_BAD_RESP_ERR:
        "bad response: the peer answered with an unexpected packet"
    LocalAccess = IBV_WC_LOC_ACCESS_ERR:
        "local access error: the device may not write the local range; the region was registered without local write"
    RemoteInvalidRequest = IBV_WC_REM_INV_REQ_ERR:
        "the peer refused the request as invalid: its queue pair does not allow the operation, or the lengths disagree"
    RemoteAccess = IBV_WC_REM_ACCESS_ERR:
        "the peer refused access: the remote key is wrong or revoked, or the range leaves the region"
    RemoteOperation = IBV_WC_REM_OP_ERR:
        "the peer's device could not carry the operation out"
    RetryExceeded = IBV_WC_RETRY_EXC_ERR:
        "no answer from the peer after all retries: look at its GID and the route to it, the MTU, a firewall on \
         UDP port 4791, the cable; or its queue pair is gone"
    ReceiverNotReady = IBV_WC_RNR_RETRY_EXC_ERR:
        "the peer had no receive posted for an immediate after all retries"
    LocalReliableDatagramDomain = IBV_WC_LOC_RDD_VIOL_ERR:
        "local reliable datagram domain violation: reliable datagrams are not used here"
    RemoteInvalidReadRequest = IBV_WC_REM_INV_RD_REQ_ERR:
        "the peer refused a reliable datagram read: reliable datagrams are not used here"
    RemoteAborted = IBV_WC_REM_ABORT_ERR:
        "the peer aborted the operation: its queue pair was closed or failed"
    InvalidEndToEndContext = IBV_WC_INV_EECN_ERR:
        "invalid end-to-end context number: meant for reliable datagrams, which are not used here"
    InvalidEndToEndContextState = IBV_WC_INV_EEC_STATE_ERR:
        "invalid end-to-end context state: meant for reliable datagrams, which are not used here"
    Fatal = IBV_WC_FATAL_ERR:
        "fatal: the local device or its driver failed"
    ResponseTimeout = IBV_WC_RESP_TIMEOUT_ERR:
        "response timeout: the peer did not answer in time"
    General = IBV_WC_GENERAL_ERR:
        "general error: the device says no more; its vendor code may"
    TagMatching = IBV_WC_TM_ERR:
        "tag matching error: tag matching is not used here"
    TagMatchingRendezvous = IBV_WC_TM_RNDV_INCOMPLETE:
        "tag matching rendezvous incomplete: tag matching is not used here"
}

impl CompletionStatus {
    /// Whether memory protection at either end stopped the request. The cause is a wrong key or range, never
    /// the network: trying another transport would hide it.
    pub fn is_protection_error(self) -> bool {
        matches!(
            self,
            CompletionStatus::LocalProtection
                | CompletionStatus::LocalAccess
                | CompletionStatus::RemoteAccess
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_status_of_the_header_has_a_name_and_a_sentence_of_its_own() {
        let statuses: Vec<_> = (1..24).map(CompletionStatus::from_raw).collect();
        assert_eq!(statuses, CompletionStatus::ALL);
        let sentences: HashSet<_> = statuses.iter().map(ToString::to_string).collect();
        assert_eq!(sentences.len(), 23);
        assert!(!statuses.iter().any(|status| matches!(status, CompletionStatus::Unknown(_))));
    }

    #[test]
    fn an_unknown_status_keeps_its_number() {
        assert_eq!(CompletionStatus::from_raw(24), CompletionStatus::Unknown(24));
        assert_eq!(CompletionStatus::Unknown(24).to_string(), "unknown completion status 24");
    }

    #[test]
    fn only_protection_errors_forbid_another_transport() {
        let all = CompletionStatus::ALL.iter().copied();
        let found: Vec<_> = all.filter(|status| status.is_protection_error()).collect();
        let expected = [
            CompletionStatus::LocalProtection,
            CompletionStatus::LocalAccess,
            CompletionStatus::RemoteAccess,
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn the_vendor_code_is_told_when_there_is_one() {
        assert!(CompletionError::from_raw(12, 0x81).to_string().ends_with("(vendor code 0x81)"));
        assert!(!CompletionError::from_raw(12, 0).to_string().contains("vendor"));
    }
}
