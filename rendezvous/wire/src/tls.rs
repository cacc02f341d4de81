//! TLS 1.3 with raw public keys (RFC 7250), the other side's key pinned or asked for.
//!
//! No certificate, no authority, no clock: the key *is* the identity. A raw Ed25519 public key is 44 bytes of
//! SubjectPublicKeyInfo (RFC 8410), of which the first 12 never change.

use std::sync::Arc;

use rustls::client::AlwaysResolvesClientRawPublicKeys;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme, version::TLS13,
};

use crate::identity::{KeyPair, PeerId};

/// DER of SubjectPublicKeyInfo for Ed25519, up to the key itself (RFC 8410, section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The identity in a raw public key; `None` when it is not Ed25519.
pub fn identity_of(spki: &[u8]) -> Option<PeerId> {
    let key = spki.strip_prefix(&SPKI_PREFIX)?;
    Some(PeerId::from_bytes(key.try_into().ok()?))
}

/// The identity that a handshake proved, from what quinn's `peer_identity()` or rustls' `peer_certificates()`
/// gives.
pub fn proven_identity(certificates: &[CertificateDer<'_>]) -> Option<PeerId> {
    match certificates {
        [only] => identity_of(only),
        _ => None,
    }
}

/// The one cryptographic provider of the project, given everywhere by hand: the process default is ambiguous.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A client that proves `own` and accepts a server only if it proves `expected`.
pub fn client_config(own: &KeyPair, expected: PeerId, alpn: &[u8]) -> Result<ClientConfig, Error> {
    let provider = provider();
    let key = certified_key(own, &provider)?;
    let verifier = Arc::new(PinnedKey { expected: Some(expected), provider: provider.clone() });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(key)));
    config.enable_sni = false;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// A server that proves `own` and accepts a client that proves `expected`, or any key when that is `None`.
pub fn server_config(own: &KeyPair, expected: Option<PeerId>, alpn: &[u8]) -> Result<ServerConfig, Error> {
    let provider = provider();
    let key = certified_key(own, &provider)?;
    let verifier = Arc::new(PinnedKey { expected, provider: provider.clone() });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(key)));
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

fn certified_key(own: &KeyPair, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, Error> {
    let key = provider.key_provider.load_private_key(PrivateKeyDer::Pkcs8(own.to_der().into()))?;
    let public = key.public_key().ok_or_else(|| Error::General("the key has no public half".into()))?;
    let certificate = CertificateDer::from(public.to_vec());
    Ok(Arc::new(CertifiedKey::new(vec![certificate], key)))
}

/// Accepts exactly one key, or any Ed25519 key, as a raw public key.
#[derive(Debug)]
struct PinnedKey {
    expected: Option<PeerId>,
    provider: Arc<CryptoProvider>,
}

impl PinnedKey {
    fn judge(&self, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Result<(), Error> {
        let id = identity_of(leaf).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if !intermediates.is_empty() || self.expected.is_some_and(|expected| expected != id) {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(())
    }

    fn signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(leaf.as_ref());
        verify_tls13_signature_with_raw_key(
            message,
            &key,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }
}

fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken here".into()))
}

impl ServerCertVerifier for PinnedKey {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.judge(leaf, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for PinnedKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.judge(leaf, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ClientConnection, ServerConnection};

    /// Runs a handshake in memory and gives what each side ends with.
    fn handshake(client: ClientConfig, server: ServerConfig) -> (Result<(), Error>, Result<PeerId, Error>) {
        let name = ServerName::try_from("peer").unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = ServerConnection::new(Arc::new(server)).unwrap();
        for _ in 0..4 {
            let mut wire = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut wire).unwrap();
            }
            server.read_tls(&mut &wire[..]).unwrap();
            if let Err(error) = server.process_new_packets() {
                return (Ok(()), Err(error));
            }
            let mut wire = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            client.read_tls(&mut &wire[..]).unwrap();
            if let Err(error) = client.process_new_packets() {
                return (Err(error), Err(Error::HandshakeNotComplete));
            }
        }
        (Ok(()), Ok(proven_identity(server.peer_certificates().unwrap()).unwrap()))
    }

    #[test]
    fn each_side_learns_the_others_key() {
        let (a, b) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let client = client_config(&a, b.id(), b"x").unwrap();
        let (client_end, server_end) = handshake(client, server_config(&b, None, b"x").unwrap());
        client_end.unwrap();
        assert_eq!(server_end.unwrap(), a.id());
    }

    #[test]
    fn a_wrong_key_is_refused_on_either_side() {
        let (a, b) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let stranger = PeerId::from_bytes([3; 32]);
        let refused = |error| {
            matches!(error, Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        };
        let client = client_config(&a, stranger, b"x").unwrap();
        assert!(refused(handshake(client, server_config(&b, None, b"x").unwrap()).0.unwrap_err()));
        let client = client_config(&a, b.id(), b"x").unwrap();
        assert!(refused(handshake(client, server_config(&b, Some(stranger), b"x").unwrap()).1.unwrap_err()));
    }
}
