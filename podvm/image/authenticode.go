// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"debug/pe"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
)

// signer signs EFI programs for UEFI Secure Boot.
type signer struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate
}

// readSigner reads an RSA key and its certificate, PEM both. Firmware knows no other kind
// of key for certain (UEFI 2.10, 32.2: PKCS#7 with RSA and SHA-256).
func readSigner(keyFile, certFile string) (*signer, error) {
	if keyFile == "" && certFile == "" {
		return nil, nil
	}
	if keyFile == "" || certFile == "" {
		return nil, errors.New("signing needs both a key and its certificate: give -sign-key and -sign-cert")
	}
	block := func(path string) ([]byte, error) {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		p, _ := pem.Decode(b)
		if p == nil {
			return nil, fmt.Errorf("%s is not PEM", path)
		}
		return p.Bytes, nil
	}
	der, err := block(keyFile)
	if err != nil {
		return nil, fmt.Errorf("signing key: %w", err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		if parsed, err = x509.ParsePKCS1PrivateKey(der); err != nil {
			return nil, fmt.Errorf("signing key: %s is no private key in PKCS #8 or PKCS #1 without a passphrase", keyFile)
		}
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("signing key: %s is not an RSA key", keyFile)
	}
	if der, err = block(certFile); err != nil {
		return nil, fmt.Errorf("signing certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("signing certificate: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("signing certificate %s is not that of the key %s", certFile, keyFile)
	}
	return &signer{key, cert}, nil
}

// authenticodeHash is the SHA-256 of an EFI program without what signing changes: the
// checksum, the directory's entry of signatures, and the signatures (Windows Authenticode
// Portable Executable Signature Format, "Calculating the PE Image Hash"). It is what
// firmware compares and measures into PCR 4. The file's sections must stand in it one
// after the other to its end, as appendSections makes them.
func authenticodeHash(program []byte) ([sha256.Size]byte, error) {
	f, err := pe.NewFile(bytes.NewReader(program))
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	opt, ok := f.OptionalHeader.(*pe.OptionalHeader64)
	if !ok {
		return [sha256.Size]byte{}, errors.New("not a 64-bit program")
	}
	optional := int(binary.LittleEndian.Uint32(program[peOffsetField:])) + peSignatureSize + coffHeaderSize
	checksum, security := optional+checksumOffset, optional+securityOffset
	end := len(program)
	if d := opt.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_SECURITY]; d.Size != 0 {
		end = int(d.VirtualAddress) // of a file, this one time
	}
	h := sha256.New()
	h.Write(program[:checksum])
	h.Write(program[checksum+4 : security])
	h.Write(program[security+8 : end])
	h.Write(make([]byte, (8-end%8)%8))
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// Object identifiers: PKCS #7, PKCS #9 (RFC 2315, RFC 2985) and Microsoft's Authenticode.
var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidRSA           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidSHA256        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidIndirectData  = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}
	oidPEImageData   = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 15}
)

type (
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue
	}
	// indirectData is Microsoft's SpcIndirectDataContent with SpcPeImageData.
	indirectData struct {
		Data   peImageData
		Digest digestInfo
	}
	peImageData struct {
		Type  asn1.ObjectIdentifier
		Value peImageValue
	}
	peImageValue struct {
		Flags asn1.BitString
		File  asn1.RawValue
	}
	digestInfo struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
	issuerAndSerial struct {
		Issuer asn1.RawValue
		Serial asn1.RawValue
	}
	attribute struct {
		Type   asn1.ObjectIdentifier
		Values asn1.RawValue
	}
	signerInfo struct {
		Version    int
		Signer     issuerAndSerial
		Digest     pkix.AlgorithmIdentifier
		Attributes asn1.RawValue
		Encryption pkix.AlgorithmIdentifier
		Signature  []byte
	}
	signedData struct {
		Version      int
		Digests      []pkix.AlgorithmIdentifier `asn1:"set"`
		Content      contentInfo
		Certificates asn1.RawValue
		Signers      []signerInfo `asn1:"set"`
	}
)

// tagged is content under a context tag, or in a universal set.
func tagged(class, tag int, content []byte) asn1.RawValue {
	return asn1.RawValue{Class: class, Tag: tag, IsCompound: true, Bytes: content}
}

// must marshals what cannot fail to.
func must(v any) []byte {
	b, err := asn1.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// sign returns the program with a signature at its end. Without a time in it, which
// firmware would not check, the same key gives the same bytes.
func (s *signer) sign(program []byte) ([]byte, error) {
	program = pad(bytes.Clone(program), 8)
	sum, err := authenticodeHash(program)
	if err != nil {
		return nil, err
	}
	sha := pkix.AlgorithmIdentifier{Algorithm: oidSHA256, Parameters: asn1.NullRawValue}
	// An empty file name, as a choice of choices.
	file := tagged(asn1.ClassContextSpecific, 0, must(tagged(asn1.ClassContextSpecific, 2, must(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0}))))
	content := must(indirectData{
		Data:   peImageData{oidPEImageData, peImageValue{File: file}},
		Digest: digestInfo{sha, sum[:]},
	})
	// The digest of the content is over its value, without tag and length.
	var outer asn1.RawValue
	if _, err := asn1.Unmarshal(content, &outer); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(outer.Bytes)
	// In DER, a set's members stand in the order of their bytes; these do.
	attributes := append(
		must(attribute{oidContentType, tagged(asn1.ClassUniversal, asn1.TagSet, must(oidIndirectData))}),
		must(attribute{oidMessageDigest, tagged(asn1.ClassUniversal, asn1.TagSet, must(digest[:]))})...)
	signed := sha256.Sum256(must(tagged(asn1.ClassUniversal, asn1.TagSet, attributes)))
	signature, err := rsa.SignPKCS1v15(nil, s.key, crypto.SHA256, signed[:])
	if err != nil {
		return nil, err
	}
	serial := must(s.cert.SerialNumber)
	data := must(contentInfo{oidSignedData, tagged(asn1.ClassContextSpecific, 0, must(signedData{
		Version:      1,
		Digests:      []pkix.AlgorithmIdentifier{sha},
		Content:      contentInfo{oidIndirectData, tagged(asn1.ClassContextSpecific, 0, content)},
		Certificates: tagged(asn1.ClassContextSpecific, 0, s.cert.Raw),
		Signers: []signerInfo{{
			Version:    1,
			Signer:     issuerAndSerial{asn1.RawValue{FullBytes: s.cert.RawIssuer}, asn1.RawValue{FullBytes: serial}},
			Digest:     sha,
			Attributes: tagged(asn1.ClassContextSpecific, 0, attributes),
			Encryption: pkix.AlgorithmIdentifier{Algorithm: oidRSA, Parameters: asn1.NullRawValue},
			Signature:  signature,
		}},
	}))})
	return attach(program, data)
}

// attach appends a signature as a WIN_CERTIFICATE of type PKCS_SIGNED_DATA.
func attach(program, data []byte) ([]byte, error) {
	const header, revision2, pkcsSignedData = 8, 0x0200, 0x0002
	entry := binary.LittleEndian.AppendUint32(nil, uint32(header+len(data)))
	entry = binary.LittleEndian.AppendUint16(entry, revision2)
	entry = binary.LittleEndian.AppendUint16(entry, pkcsSignedData)
	entry = pad(append(entry, data...), 8)
	optional := int(binary.LittleEndian.Uint32(program[peOffsetField:])) + peSignatureSize + coffHeaderSize
	binary.LittleEndian.PutUint32(program[optional+securityOffset:], uint32(len(program)))
	binary.LittleEndian.PutUint32(program[optional+securityOffset+4:], uint32(len(entry)))
	return append(program, entry...), nil
}
